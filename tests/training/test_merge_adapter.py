"""An adapter's checkpoint becomes a plain model that computes the same, in whatever type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Return the tiny policy in the dtype of the test's parameter."""
    import shutil

    import torch
    from transformers import AutoModelForImageTextToText

    from rcot_rl.inference.model_folder import TINY

    folder = Path(shutil.copytree(TINY, tmp_path / "base"))
    dtype = getattr(torch, getattr(request, "param", "float32"))
    AutoModelForImageTextToText.from_pretrained(TINY, dtype=dtype).save_pretrained(folder)
    return folder


def checkpoint(base: Path, folder: Path) -> Path:
    """Write what verl's SFT trainer leaves on one rank, with an adapter far from zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    targets = r".*language_model.*\.(q_proj|down_proj)"
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    torch.manual_seed(0)
    state = wrapped.state_dict()
    for name, value in state.items():
        if "lora_" in name:
            value.normal_(0, 0.05)
    folder.mkdir()
    torch.save(state, folder / "model_world_size_1_rank_0.pt")
    (folder / "lora_train_meta.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    return folder


@pytest.mark.parametrize("base", ["float32", "bfloat16"], indirect=True)
def test_the_merged_model_computes_what_the_adapter_did(base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from rcot_rl.training.merge_adapter import merge

    gaps = merge(base, checkpoint(base, tmp_path / "ckpt"), tmp_path / "out")
    before = AutoModelForImageTextToText.from_pretrained(base)
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert after.dtype == before.dtype
    assert gaps.merged < 1e-3
    assert gaps.rounded == 0 if before.dtype == torch.float32 else 0 < gaps.rounded < 1
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved and all("q_proj" in n or "down_proj" in n for n in moved)
    assert not any("lora" in n for n, _ in after.named_parameters())
    AutoProcessor.from_pretrained(tmp_path / "out")


def test_a_merge_that_changes_outputs_is_an_error(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from rcot_rl.training import merge_adapter

    build = merge_adapter.get_peft_model

    def careless(*arguments: object) -> torch.nn.Module:
        wrapped = build(*arguments)
        merge_exactly = wrapped.merge_and_unload

        def merged() -> torch.nn.Module:
            model = merge_exactly()
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "down_proj" in n).mul_(1.01)
            return model

        wrapped.merge_and_unload = merged
        return wrapped

    trained = checkpoint(base, tmp_path / "ckpt")
    monkeypatch.setattr(merge_adapter, "get_peft_model", careless)
    with pytest.raises(RuntimeError, match="differ from the adapter's"):
        merge_adapter.merge(base, trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()

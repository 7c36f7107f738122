"""Checkpoints of the original SAM2: names, equal masks, and what is refused.

`sam2.1_hiera_tiny.txt` lists the weights of that model as the `sam2` package (1.1.0) builds it from
its own configuration. SAM2 lacks the three of SAM21_ONLY. The slow tests need the package.
"""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Sam2VideoModel

from rcot_rl.errors import InputError
from rcot_rl.recipe.inference_section import SegmenterSection
from rcot_rl.segmentation import original_sam2
from rcot_rl.segmentation.original_sam2 import new_name, original_config, read_original, renamed
from rcot_rl.segmentation.segmenter import TINY, collect, load_segmenter
from rcot_rl.tiny.sam2_model import BLOCKS, HIDDEN, STAGE_WIDTHS, tiny_config

SHAPES = Path(__file__).with_name("sam2.1_hiera_tiny.txt")
SAM21_ONLY = {"no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias"}


def published_weights(version="2.1"):
    """Return the weights of the tiny published model, without values."""
    lines = (line.split() for line in SHAPES.read_text().splitlines())
    shapes = {name: [int(n) for n in sizes] for name, *sizes in lines}
    left_out = SAM21_ONLY if version == "2.0" else set()
    return {
        name: torch.empty(shape, device="meta")
        for name, shape in shapes.items()
        if name not in left_out
    }


def shapes_of(weights):
    return {name: tuple(value.shape) for name, value in weights.items()}


def expected_shapes(config):
    with torch.device("meta"):
        return shapes_of(Sam2VideoModel(config).state_dict())


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_every_weight_of_a_published_checkpoint_finds_its_place(version):
    weights = published_weights(version)
    config = original_config(weights, Path("x.pt"))
    assert config.enable_occlusion_spatial_embedding == (version == "2.1")
    assert config.enable_temporal_pos_encoding_for_object_pointers == (version == "2.1")
    assert shapes_of(renamed(weights)) == expected_shapes(config)


def original_names():
    """Return transformers' name -> original name, for the weights of models of any depth."""
    names = set(published_weights())
    names |= {
        ".".join([*name.split(".")[:3], str(block), *name.split(".")[4:]])
        for name in names
        if ".trunk.blocks." in name
        for block in range(12)
    }
    return {new_name(name): name for name in names}


def tiny_in_original_names():
    """Return the shipped tiny SAM2's weights as the original implementation names them."""
    names, weights = original_names(), load_file(TINY / "model.safetensors")
    del weights["shared_image_embedding.positional_embedding"]
    points = weights.pop("prompt_encoder.point_embed.weight")
    out = {names[name]: value for name, value in weights.items()}
    for label, row in enumerate(points):
        out[f"sam_prompt_encoder.point_embeddings.{label}.weight"] = row[None]
    return out


@pytest.fixture
def as_published(monkeypatch):
    """Let the loader accept the shapes of the tiny model."""
    monkeypatch.setattr(original_sam2, "original_config", lambda *_: tiny_config())


def moving_disc(length=8):
    """Return uint8 [T, 128, 128, 3] of a red disc on grey noise, box and point of frame 3."""
    ys, xs = np.mgrid[:128, :128]
    frames = np.random.default_rng(0).integers(60, 90, (length, 128, 128, 3), dtype=np.uint8)
    for t, frame in enumerate(frames):
        frame[(ys - 60) ** 2 + (xs - 30 - 8 * t) ** 2 < 18**2] = (220, 40, 40)
    return frames, np.array([[36.0, 42.0, 72.0, 78.0]]), np.array([[54.0, 60.0]])


def test_a_checkpoint_file_gives_the_masks_of_the_same_weights(tmp_path, as_published):
    file = tmp_path / "sam2.1_hiera_mine.pt"
    torch.save({"model": tiny_in_original_names()}, file)
    frames, box, point = moving_disc()
    loaded = load_segmenter(str(file))
    assert loaded.name == "sam2:sam2.1_hiera_mine.pt"
    masks = collect(loaded.segment(frames, 3, box, point))
    assert masks[0, 3].sum() > 500
    expected = collect(load_segmenter("tiny").segment(frames, 3, box, point))
    assert np.array_equal(masks, expected)
    half = load_segmenter(str(file), settings=SegmenterSection(dtype="bfloat16"))
    assert half.model.dtype == torch.bfloat16


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_runs_code_is_refused_and_runs_none(tmp_path):
    target = tmp_path / "made"
    torch.save({"model": Hostile(str(target))}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt: cannot be read as a checkpoint"):
        load_segmenter(str(tmp_path / "x.pt"))
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "not a checkpoint of SAM2"),
        ({"state_dict": {}}, "not a checkpoint of SAM2"),
        ({"model": {"a": 1}}, "not a checkpoint of SAM2"),
        ({"model": {"a": torch.zeros(1)}}, "width 0 with 0 blocks"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, content, says):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=says):
        load_segmenter(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("change", ["lacks", "has unknown"])
def test_a_checkpoint_with_other_weights_is_refused(tmp_path, as_published, change):
    weights = tiny_in_original_names()
    if change == "lacks":
        del weights["memory_encoder.out_proj.bias"]
    else:
        weights["memory_encoder.extra"] = torch.zeros(2)
    torch.save({"model": weights}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=rf"{change} weights .*1 in all") as caught:
        load_segmenter(str(tmp_path / "x.pt"))
    assert caught.value.key.startswith("memory_encoder.")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    file = tmp_path / "x.pt"
    torch.save({"model": {"a": torch.zeros(1000)}}, file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match="not a complete PyTorch checkpoint"):
        load_segmenter(str(file))


def package():
    return pytest.importorskip("sam2", reason="pip install --no-deps sam2==1.1.0")


def published_model(name):
    """Return a published model with random weights, built by the package."""
    package()
    from hydra import compose
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = compose(config_name=f"configs/{name.split('_')[0]}/{name}.yaml")
    OmegaConf.resolve(config)
    return instantiate(config.model, _recursive_=True).eval()


@pytest.mark.slow
@pytest.mark.parametrize("size", ["t", "s", "b+", "l"])
@pytest.mark.parametrize("version", ["sam2", "sam2.1"])
def test_every_published_configuration_of_the_package_is_recognized(version, size):
    weights = published_model(f"{version}_hiera_{size}").state_dict()
    assert shapes_of(renamed(weights)) == expected_shapes(original_config(weights, Path("x.pt")))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["t", "s", "b+", "l"])
def test_image_features_equal_those_of_the_package(size, tmp_path):
    """Head counts and windows are not visible in shapes; a wrong one changes the features."""
    model = published_model(f"sam2.1_hiera_{size}")
    torch.save({"model": model.state_dict()}, tmp_path / "x.pt")
    config, weights = read_original(tmp_path / "x.pt")
    ours = Sam2VideoModel(config).eval()
    ours.load_state_dict(weights)
    pixels = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model.forward_image(pixels)["backbone_fpn"]
        features = ours.get_image_features(pixels, return_dict=True).fpn_hidden_states
    for a, b in zip(theirs, features, strict=True):
        a = a.flatten(2).permute(2, 0, 1)
        assert a.std() > 1e-3
        assert (a - b).abs().max() < 1e-3 * a.abs().max()


@pytest.mark.slow
def test_masks_equal_those_of_the_package(tmp_path, as_published):
    """The tiny model in both implementations, on the same frames and prompts."""
    package()
    weights = {name: value.float() for name, value in tiny_in_original_names().items()}
    torch.save({"model": weights}, tmp_path / "tiny.pt")
    frames, box, point = moving_disc()
    decoded = []
    for t, frame in enumerate(frames):
        cv2.imwrite(str(tmp_path / f"{t}.jpg"), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        decoded.append(cv2.imread(str(tmp_path / f"{t}.jpg"), cv2.IMREAD_COLOR_RGB))
    model = package_tiny()
    model.load_state_dict(weights)
    theirs = np.zeros((len(frames), 128, 128), bool)
    for reverse in (False, True):  # as in ours, neither pass sees the other's memory
        state = model.init_state(str(tmp_path))
        model.add_new_points_or_box(state, 3, 1, points=point, labels=[1], box=box[0])
        for t, _, logits in model.propagate_in_video(state, 3, reverse=reverse):
            theirs[t] = logits[0, 0].numpy() > 0
    segmenter = load_segmenter(str(tmp_path / "tiny.pt"))
    ours = collect(segmenter.segment(np.stack(decoded), 3, box, point))[0]
    assert min(ours.sum((1, 2))) > 500
    differing = (ours != theirs).sum()
    print(f"{differing} of {ours.size} pixels differ")
    assert differing <= 0.0005 * ours.size


def package_tiny():
    """Return the package's video predictor in the tiny model's shapes."""
    from sam2.modeling import memory_attention, memory_encoder
    from sam2.modeling.backbones import hieradet, image_encoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam.mask_decoder import MaskDecoder
    from sam2.modeling.sam.transformer import RoPEAttention, TwoWayTransformer
    from sam2.sam2_video_predictor import SAM2VideoPredictor

    trunk = hieradet.Hiera(
        embed_dim=STAGE_WIDTHS[0],
        num_heads=1,
        stages=BLOCKS,
        window_spec=(8, 4, 8, 4),
        global_att_blocks=(sum(BLOCKS) - 2,),
        window_pos_embed_bkg_spatial_size=(4, 4),
    )
    neck = image_encoder.FpnNeck(
        PositionEmbeddingSine(num_pos_feats=HIDDEN, normalize=True),
        d_model=HIDDEN,
        backbone_channel_list=list(STAGE_WIDTHS)[::-1],
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    rope = {"embedding_dim": HIDDEN, "num_heads": 1, "downsample_rate": 1, "feat_sizes": (8, 8)}
    layer = memory_attention.MemoryAttentionLayer(
        activation="relu",
        cross_attention=RoPEAttention(rope_k_repeat=True, kv_in_dim=64, **rope),
        d_model=HIDDEN,
        dim_feedforward=4 * HIDDEN,
        dropout=0.0,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        self_attention=RoPEAttention(**rope),
    )
    encoder = memory_encoder.MemoryEncoder(
        out_dim=64,
        mask_downsampler=memory_encoder.MaskDownSampler(
            embed_dim=HIDDEN, kernel_size=3, stride=2, padding=1
        ),
        fuser=memory_encoder.Fuser(memory_encoder.CXBlock(HIDDEN), 2),
        position_encoding=PositionEmbeddingSine(num_pos_feats=64, normalize=True),
        in_dim=HIDDEN,
    )
    model = SAM2VideoPredictor(
        image_encoder=image_encoder.ImageEncoder(trunk, neck, scalp=1),
        memory_attention=memory_attention.MemoryAttention(HIDDEN, True, layer, 2),
        memory_encoder=encoder,
        num_maskmem=4,
        max_obj_ptrs_in_encoder=4,
        image_size=128,
        sigmoid_scale_for_mem_enc=20.0,
        sigmoid_bias_for_mem_enc=-10.0,
        binarize_mask_from_pts_for_mem_enc=True,
        use_mask_input_as_output_without_sam=True,
        directly_add_no_mem_embed=True,
        no_obj_embed_spatial=True,
        use_high_res_features_in_sam=True,
        use_obj_ptrs_in_encoder=True,
        add_tpos_enc_to_obj_ptrs=True,
        proj_tpos_enc_in_obj_ptrs=True,
        use_signed_tpos_enc_to_obj_ptrs=True,
        only_obj_ptrs_in_the_past_for_eval=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        fixed_no_obj_ptr=True,
        use_multimask_token_for_obj_ptr=True,
        use_mlp_for_obj_ptr_proj=True,
    )
    # the package has no setting for the decoder's widths
    model.sam_mask_decoder = MaskDecoder(
        transformer_dim=HIDDEN,
        transformer=TwoWayTransformer(2, HIDDEN, num_heads=4, mlp_dim=4 * HIDDEN),
        iou_head_hidden_dim=HIDDEN,
        use_high_res_features=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        use_multimask_token_for_obj_ptr=True,
    )
    return model.eval()

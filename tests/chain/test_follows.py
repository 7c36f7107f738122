"""From where a GRPO stage's policy starts, whichever commands ran the stages before it."""

from pathlib import Path

from rcot_rl.chain import follows
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.runfolder import RunFolder


def test_ktg_goes_on_from_aks_of_the_same_recipe_or_of_an_earlier_command(tmp_path: Path) -> None:
    alone = load_recipe("grpo_ktg")
    folder = RunFolder.claim(tmp_path / "run", alone)
    assert not follows("grpo-aks", alone, folder), "AKS was never run here: KTG starts at SFT's"
    assert follows("grpo-aks", load_recipe("rcot_seg_3b"), folder)
    folder.mark_done("grpo-aks")
    assert follows("grpo-aks", alone, folder)

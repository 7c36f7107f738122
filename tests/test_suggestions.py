"""A name is suggested only if it is close to the one that was given."""

from __future__ import annotations

import random
import string
import time

import pytest

from rcot_rl.recipe.schema import Recipe
from rcot_rl.recipe.training_section import GrpoStage
from rcot_rl.suggestions import did_you_mean, nearest

SECTIONS = list(Recipe.model_fields)
GRPO = list(GrpoStage.model_fields)


@pytest.mark.parametrize(
    ("wrong", "known", "expected"),
    [
        ("optimizer", SECTIONS, None),
        ("lr", SECTIONS, None),
        ("lr", [key for key in GRPO if key != "lora_rank"], "learning_rate"),
        ("lr", GRPO, None),
        ("kl_coef", GRPO, "kl_loss_coef"),
        ("grpo_aks", ["grpo-aks", "grpo-ktg"], "grpo-aks"),
        ("gpu", ["cuda", "cpu"], None),
        ("optim.lr", ["actor.optim.lr", "trainer.lr"], "actor.optim.lr"),
        ("optim.lr", ["actor.optim.lr", "critic.optim.lr"], None),
        ("actor_rollout_ref.actor.zzz", ["actor_rollout_ref.actor.strategy"], None),
        ("trainer.total_epochs.deeper", ["trainer.total_epochs"], "trainer.total_epochs"),
    ],
)
def test_nearest_follows_the_rules(wrong: str, known: list[str], expected: str | None) -> None:
    assert nearest(wrong, known) == expected


def test_equally_close_names_are_all_suggested() -> None:
    assert did_you_mean("lr", GRPO) == "; did you mean learning_rate or lora_rank?"


def test_key_with_one_typo_gets_a_suggestion_and_noise_does_not() -> None:
    generator = random.Random(1)
    long = [key for key in GRPO if len(key) >= 6]
    for key in long:
        at = generator.randrange(1, len(key))
        assert nearest(key[:at] + key[at + 1 :], GRPO) == key
        noise = "".join(generator.choices("qxzjvw", k=len(key)))
        assert did_you_mean(noise, GRPO) == ""


def test_long_text_is_rejected_quickly() -> None:
    text = "".join(random.Random(2).choices(string.ascii_letters, k=100_000))
    started = time.monotonic()
    assert nearest(text, [text[:-1]] * 3) is None
    assert time.monotonic() - started < 1

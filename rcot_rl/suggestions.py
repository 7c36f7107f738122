""" "did you mean" for recipe keys, verl keys, rewards, files, stages and splits.

A known name is suggested only if it is close to the given one. The first rule with a match decides,
and all its matches are suggested if there are at most `MOST`:

1. the names are equal except for case and the marks `-`, `_` and blank (`grpo_aks`, `grpo-aks`);
2. the given name consists of the initials of the known name's words (`lr`, `learning_rate`);
3. it is the end of a dotted key (`actor.optim.lr`, `actor_rollout_ref.actor.optim.lr`);
4. it lies below a key without children (`trainer.total_epochs.deeper`).

Otherwise the most similar name is suggested if it has as many dotted parts as the given one, and
each part has a difflib ratio of at least `SIMILAR`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

SIMILAR = 0.7
MOST = 4
_MAX_LENGTH = 200
"""Maximum number of characters; the time of a comparison grows with their square."""
_MARKS = re.compile(r"[-_ ]+")


def did_you_mean(wrong: object, known: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean <prefix><name>?`, or "" if no known name is close to `wrong`."""
    names = [prefix + name for name in close_names(str(wrong), known)]
    return f"; did you mean {' or '.join(names)}?" if names else ""


def nearest(wrong: str, known: Iterable[str]) -> str | None:
    """Return the one known name that is close to `wrong`; None for no or several names."""
    names = close_names(wrong, known)
    return names[0] if len(names) == 1 else None


def close_names(wrong: str, known: Iterable[str]) -> list[str]:
    """Return the known names that are close to `wrong` by the module's rules, at most `MOST`."""
    names = list(dict.fromkeys(known))
    if not wrong or len(wrong) > _MAX_LENGTH:
        return []
    for rule in (_is_same_word, is_initials, _is_end_of):
        close = [name for name in names if rule(wrong, name)]
        if close:
            return close if len(close) <= MOST else []
    for name in names:
        if wrong.startswith(f"{name}.") and not any(n.startswith(f"{name}.") for n in names):
            return [name]
    score, best = max(((_similarity(wrong, name), name) for name in names), default=(0.0, ""))
    return [best] if score >= SIMILAR else []


def is_initials(wrong: str, name: str) -> bool:
    """Return True if `wrong` consists of the initials of the words of `name`, at least two."""
    words = [word for word in _MARKS.split(name) if word]
    return len(words) > 1 and wrong.lower() == "".join(word[0] for word in words).lower()


def _is_same_word(wrong: str, name: str) -> bool:
    return _MARKS.sub("", wrong).lower() == _MARKS.sub("", name).lower()


def _is_end_of(wrong: str, name: str) -> bool:
    return name.endswith(f".{wrong}")


def _similarity(wrong: str, name: str) -> float:
    """Return the mean ratio of the dotted parts; 0 if one is below `SIMILAR` or counts differ."""
    given, known = wrong.lower().split("."), name.lower().split(".")
    if len(given) != len(known):
        return 0.0
    total = 0.0
    for a, b in zip(given, known, strict=True):
        matcher = SequenceMatcher(None, a, b)
        if matcher.quick_ratio() < SIMILAR or (ratio := matcher.ratio()) < SIMILAR:
            return 0.0
        total += ratio
    return total / len(given)

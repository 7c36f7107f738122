"""Prompts for VDG, KFG, AKS and KTG (paper, sections 3.2, 3.3, A.3).

The texts of the paper's prompt figures are not public, so these are our own. A template set is a
YAML file with the keys of `TASKS`; recipes name a shipped set (`qwen`, `compact`) or a path.
`compact` has the same content in fewer tokens, for policies with a small context. Shards, SFT,
rollouts and inference use the same set: a prompt that differs between training and inference is a
silent fault. A set may also have the templates of `ANSWER_ONLY`, for policies without reasoning.

Templates use `string.Template` fields (`$query`), so braces in JSON examples and in expressions
have no meaning. Control tokens in a field are neutralized (`control_tokens`). The media placeholder
is not part of a template: `user_turn` adds it.

The optional template `video` starts every prompt about a video. If it is at least as long as a
block of vLLM's prefix cache, all prompts about a video share its frames in whole blocks, and the
video is encoded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

import yaml

from rcot_rl.errors import InputError
from rcot_rl.protocol.control_tokens import control_tokens, neutralize
from rcot_rl.protocol.frame_names import FrameNames
from rcot_rl.protocol.parser import ResponseForm
from rcot_rl.suggestions import did_you_mean

_KFG = frozenset({"query", "n_frames"})
_KFG_AGAIN = _KFG | {"rejected", "refusals", "description"}

TASKS: Mapping[str, frozenset[str]] = {
    "vdg": frozenset({"n_frames"}),
    "kfg": _KFG | {"last_frame"},
    "kfg_again": _KFG_AGAIN | {"last_frame"},
    "aks": frozenset({"query", "description"}),
    "ktg": frozenset({"query", "description", "canvas"}),
    "ktg_zero_target": frozenset({"query", "description", "canvas"}),
}
"""Template name -> fields that it may use."""

TRACES: Mapping[str, frozenset[str]] = {
    "trace_aks": frozenset({"query", "description", "answer"}),
    "trace_ktg": frozenset({"query", "description", "answer", "canvas"}),
}
"""Optional templates, by which a larger model writes reasoning for SFT."""

ANSWER_ONLY: Mapping[str, str] = {
    "aks_answer": "aks",
    "ktg_answer": "ktg",
    "ktg_zero_target_answer": "ktg_zero_target",
}
"""Optional templates that ask for the answer without reasoning (Table 15) -> what each replaces."""

OPTIONAL: Mapping[str, frozenset[str]] = {
    "video": frozenset({"n_frames"}),
    "video_thinned": frozenset({"n_frames", "total"}),
    "kfg_seconds": _KFG | {"last_second"},
    "kfg_again_seconds": _KFG_AGAIN | {"last_second"},
}
"""Optional templates: the start of every prompt about a video, if all of its frames are shown or a
uniform sample; and keyframe selection with frames named by seconds."""

SHIPPED = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class Prompts:
    """One template set. Every method returns the text of a user turn, without the media."""

    name: str
    templates: Mapping[str, str]
    extra_tokens: tuple[str, ...] = ()
    """Control tokens of the policy's tokenizer that the static pattern does not cover."""

    def vdg(self, n_frames: int, total: int | None = None) -> str:
        """Return the prompt of video description generation (eq. 1, p_vdg).

        Args:
            n_frames: Number of shown frames.
            total: Number of frames of the whole video; None: all are shown.
        """
        return self._about_video("vdg", n_frames, total, {})

    def kfg(
        self,
        query: str,
        n_frames: int,
        total: int | None = None,
        names: FrameNames = FrameNames(),
    ) -> str:
        """Return the prompt of keyframe generation (eq. 1, p_kfg); it asks for a frame's name.

        Arguments as in `vdg`. Raises InputError if the set cannot name frames by seconds.
        """
        return self._select("kfg", n_frames, total, names, {"query": query})

    def kfg_again(
        self,
        query: str,
        n_frames: int,
        refused: Sequence[tuple[int, str]],
        description: str,
        total: int | None = None,
        names: FrameNames = FrameNames(),
    ) -> str:
        """Return the prompt of re-selection after option B (eq. 3, p'_kfs).

        Arguments as in `kfg`, and:

        Args:
            refused: Position and reason of each refused frame; the reason may be empty.
        """
        lines = [
            f"- {names.name(position)}: {reason}" if reason else f"- {names.name(position)}"
            for position, reason in refused
        ]
        fields = {
            "query": query,
            "rejected": ", ".join(names.name(position) for position, _ in refused),
            "refusals": "\n".join(lines),
            "description": description,
        }
        return self._select("kfg_again", n_frames, total, names, fields)

    def aks(self, description: str, query: str) -> str:
        """Return the prompt that asks if a frame is a valid keyframe, A or B (eq. 2, p_aks)."""
        return self._fill("aks", description=description, query=query)

    def ktg(
        self, description: str, query: str, zero_target: bool = False, canvas: int = 840
    ) -> str:
        """Return the prompt that asks for the targets' boxes and points on the canvas (eq. 5)."""
        task = "ktg_zero_target" if zero_target else "ktg"
        return self._fill(task, description=description, query=query, canvas=canvas)

    def trace(
        self, task: Literal["aks", "ktg"], description: str, query: str, answer: str, canvas: int
    ) -> str:
        """Return the prompt for reasoning towards a known answer.

        Section A.1: describe the scene, analyse the target, answer. Raises InputError.
        """
        name = f"trace_{task}"
        if name not in self.templates:
            raise InputError(f"has no template {name}, which traces need; add it", file=self.name)
        fields = {"query": query, "description": description, "answer": answer, "canvas": canvas}
        return self._fill(name, **{k: v for k, v in fields.items() if k in TRACES[name]})

    def _select(
        self,
        task: str,
        n_frames: int,
        total: int | None,
        names: FrameNames,
        fields: Mapping[str, str],
    ) -> str:
        last = names.name(n_frames - 1)
        if names.times is None:
            return self._about_video(task, n_frames, total, {**fields, "last_frame": last})
        task = f"{task}_seconds"
        if task not in self.templates:
            raise InputError(
                f"has no template {task}, which predict.frame_names=seconds needs; add it, or use "
                "index",
                file=self.name,
            )
        return self._about_video(task, n_frames, total, {**fields, "last_second": last})

    def _about_video(
        self, task: str, n_frames: int, total: int | None, fields: Mapping[str, str]
    ) -> str:
        text = self._fill(task, n_frames=n_frames, **fields)
        if total is None or total == n_frames:
            start = "video"
            counts = {"n_frames": n_frames}
        else:
            start = "video_thinned"
            counts = {"n_frames": n_frames, "total": total}
        if start not in self.templates:
            return text
        return f"{self._fill(start, **counts)}\n{text}"

    def _fill(self, task: str, **fields: object) -> str:
        safe = {
            k: neutralize(v, self.extra_tokens) if isinstance(v, str) else v
            for k, v in fields.items()
        }
        text = Template(self.templates[task]).substitute(safe).strip()
        # a field and the text around it can form a token together
        return neutralize(text, self.extra_tokens, keep_tags=True)


def user_turn(text: str, media: Literal["image", "video"]) -> str:
    """Return the content of a user message: the media placeholder, then the text."""
    return f"<{media}>{text}"


def load_prompts(
    name_or_path: str,
    extra_tokens: tuple[str, ...] = (),
    response: ResponseForm = "think_answer",
) -> Prompts:
    """Load a shipped template set by name, or a user's set by path.

    Args:
        name_or_path: `qwen`, `compact` or the path of a YAML file.
        extra_tokens: `extra_control_tokens` of the policy's tokenizer, if it is present.
        response: What the policy writes; the recipe's `data.response`.

    Raises:
        InputError: The file is missing or not valid YAML, a template is missing or unknown, has a
            field that its task does not have, or contains a control token or media placeholder.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = SHIPPED / f"{name_or_path}.yaml"
    if not path.is_file():
        shipped = sorted(p.stem for p in SHIPPED.glob("*.yaml"))
        hint = did_you_mean(Path(name_or_path).stem, shipped)
        raise InputError(
            f"no such prompt set{hint} (shipped: {', '.join(shipped)})", file=name_or_path
        )
    try:
        templates = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates, encoding
        raise InputError(f"not valid YAML: {error}".replace("\n", " "), file=path) from error
    _check(templates, path, extra_tokens)
    chosen = {key: text for key, text in templates.items() if key not in ANSWER_ONLY}
    if response == "answer":
        for key, replaced in ANSWER_ONLY.items():
            if key not in templates:
                raise InputError("missing; data.response=answer needs it", file=path, key=key)
            chosen[replaced] = templates[key]
    return Prompts(path.stem, chosen, extra_tokens)


def _check(templates: object, path: Path, extra_tokens: tuple[str, ...]) -> None:
    if not isinstance(templates, dict):
        raise InputError("must be a mapping of templates", file=path)
    answer_only = {key: TASKS[task] for key, task in ANSWER_ONLY.items()}
    known = {**TASKS, **OPTIONAL, **TRACES, **answer_only}
    for key in templates.keys() | TASKS.keys():
        if key not in known:
            raise InputError(
                f"unknown template{did_you_mean(key, known)} (known: {', '.join(known)})",
                file=path,
                key=key,
            )
        text = templates.get(key)
        if not isinstance(text, str):
            raise InputError("must be a text; is missing or of another type", file=path, key=key)
        template = Template(text)
        if not template.is_valid():
            raise InputError("has a '$' that starts no field; write '$$'", file=path, key=key)
        unknown = set(template.get_identifiers()) - known[key]
        if unknown:
            allowed = ", ".join(sorted(known[key]))
            raise InputError(
                f"unknown field ${sorted(unknown)[0]} (known: {allowed})", file=path, key=key
            )
        tokens = control_tokens(text, extra_tokens, keep_tags=True)
        if tokens:
            raise InputError(
                f"contains {', '.join(tokens)}; remove it (only the chat template and verl add "
                "control tokens)",
                file=path,
                key=key,
            )

"""Descriptions and traces for rows, from templates of a toy corpus or from JSONL files.

Every prompt contains the video's description (x_vid of the paper); SFT rows also contain a trace,
the reasoning before the answer. A response is `<think>…</think>`, a line break and
`<answer>…</answer>`. `rcot_rl.annotation` makes the files with a model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipelines.corpora import Corpus
from data_pipelines.corpora.json_node import HALF_A_CHARACTER, is_text
from data_pipelines.planning.row_drawing import Instance
from data_pipelines.traces.toy_templates import Sidecar
from rcot_rl.errors import InputError
from rcot_rl.protocol.control_tokens import neutralize

TraceKey = tuple[str, str, str, str, str]
"""(task, dataset, video, expression id, frame)."""
_NO_TRACE = (
    "no trace of this instance, because the corpora or the recipe have changed; "
    "run `rcot data trace` to add what is missing"
)


def response(think: str, answer: str, extra_control: tuple[str, ...] = ()) -> str:
    """Return a well-formed response; control tokens and tags in its reasoning are neutralized.

    Args:
        extra_control: Control tokens of the policy's tokenizer beyond the known ones.
    """
    return f"<think>{neutralize(think, extra_control)}</think>\n{answer_block(answer)}"


def answer_block(answer: str) -> str:
    """Return the answer in its tags: the whole response of a policy that writes no reasoning."""
    return f"<answer>{answer}</answer>"


class Describer(Protocol):
    """A source of video descriptions."""

    def description(self, corpus: int, dataset: str, video: str) -> str:
        """Return the video's description; InputError if there is none."""

    def fingerprint(self) -> str:
        """Return a digest that changes whenever a description may have changed."""


@dataclass(frozen=True)
class FileDescriptions:
    """Descriptions from a JSONL file of {"dataset", "video", "description"}."""

    path: Path
    texts: Mapping[tuple[str, str], str]
    digest: str

    def description(self, corpus: int, dataset: str, video: str) -> str:
        """Return the video's description; InputError if the file has none."""
        if (dataset, video) not in self.texts:
            raise InputError("no description of this video", file=self.path, key=video)
        return self.texts[dataset, video]

    def fingerprint(self) -> str:
        """Return the digest of the file."""
        return self.digest


@dataclass(frozen=True)
class SidecarDescriptions:
    """Descriptions from the templates of toy corpora."""

    sidecars: Sequence[Sidecar]

    def description(self, corpus: int, dataset: str, video: str) -> str:
        """Return the description in the corpus' toy.json."""
        return self.sidecars[corpus].description(video)

    def fingerprint(self) -> str:
        """Return the digests of every toy.json."""
        return "".join(s.digest for s in self.sidecars)


def open_descriptions(describe: str, corpora: Sequence[Corpus]) -> Describer:
    """Open what `data.describe` names: `template` or a JSONL file. Raises InputError."""
    if describe == "template":
        return SidecarDescriptions(open_sidecars(corpora, "describe"))
    path = Path(describe)
    lines, digest = _read(path, ("dataset", "video", "description"))
    # an empty description is a failure of the describer and counts as missing
    texts = {(r["dataset"], r["video"]): r["description"] for r in lines if r["description"]}
    return FileDescriptions(path, texts, digest)


@dataclass(frozen=True)
class FileTraces:
    """Traces from a JSONL file: `TraceKey` and "response"; refused ones have accepted: false."""

    path: Path
    responses: Mapping[TraceKey, str]
    refused: Mapping[TraceKey, tuple[str, ...]]
    """Instances whose responses were all refused -> the causes of the last refusal."""
    statistics: Mapping[str, Any]
    """task -> number of responses, accepted ones, and refusals by cause."""
    digest: str

    def response_for(self, instance: Instance, frame: str) -> str:
        """Return the accepted response of an instance; InputError if there is none."""
        key = (
            instance.task,
            instance.dataset,
            instance.video,
            instance.expression_id,
            frame,
        )
        if key not in self.responses:
            raise InputError(_NO_TRACE, file=self.path, key="/".join(key))
        return self.responses[key]


def open_traces(trace: str, corpora: Sequence[Corpus]) -> FileTraces | list[Sidecar]:
    """Open what `data.trace` names: `template` or a JSONL file. Raises InputError."""
    if trace == "template":
        return open_sidecars(corpora, "trace")
    path = Path(trace)
    names = ("task", "dataset", "video", "expression_id", "frame", "response")
    lines, digest = _read(path, names)
    responses: dict[TraceKey, str] = {}
    refused: dict[TraceKey, tuple[str, ...]] = {}
    counts: dict[str, Counter[str]] = {}
    for r in lines:
        key = (r["task"], r["dataset"], r["video"], r["expression_id"], r["frame"])
        causes = r.get("causes") or ()
        if not isinstance(causes, list | tuple):
            raise InputError("must be a list", file=path, key="/".join((*key, "causes")))
        count = counts.setdefault(r["task"], Counter())
        count["responses"] += 1
        if r.get("accepted", True):
            count["accepted"] += 1
            responses[key] = r["response"]
        else:
            count.update(f"refused/{cause}" for cause in causes)
            refused[key] = tuple(map(str, causes))
    refused = {key: causes for key, causes in refused.items() if key not in responses}
    for task, count in counts.items():
        count["given_up"] = sum(key[0] == task for key in refused)
    statistics = {task: dict(sorted(count.items())) for task, count in sorted(counts.items())}
    return FileTraces(path, responses, refused, statistics, digest)


def open_sidecars(corpora: Sequence[Corpus], key: str) -> list[Sidecar]:
    """Read the toy.json of every corpus; InputError if a corpus has none.

    Args:
        key: `describe` or `trace`, for the error message.
    """
    sidecars = []
    for corpus in corpora:
        path = corpus.root / "toy.json"
        if not path.is_file():
            raise InputError(
                f"{corpus.root} has no templates because it is not a toy corpus (no toy.json); "
                f"set data.{key} to the path of a JSONL file (see `rcot data {key}`)",
                key=f"data.{key}",
            )
        sidecars.append(Sidecar.read(path))
    return sidecars


def _read(path: Path, names: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """Return the lines of a JSONL file, each with these string keys, and the file's sha256."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except FileNotFoundError as error:
        raise InputError("no such file", file=path) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", file=path) from error
    out = []
    # not splitlines(): JSON strings may contain its other line separators
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            # ValueError: also an integer of very many digits
            raise InputError("not valid JSON", file=path, line=number) from error
        for name in names:
            if not isinstance(item, dict) or not isinstance(item.get(name), str):
                raise InputError("missing, or not a string", file=path, line=number, key=name)
            if not is_text(item[name]):
                raise InputError(HALF_A_CHARACTER, file=path, line=number, key=name)
        out.append(item)
    return out, hashlib.sha256(raw).hexdigest()

"""Descriptions and traces that go into rows: templated from a toy corpus, or from JSONL files.

A video's description (x_vid of the paper) is in every prompt; a trace (the reasoning before the
answer) in SFT rows. Traces are turned into responses here: `<think>…</think>`, a line break,
`<answer>…</answer>`. Leaves out making either with a model.
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
from data_pipelines.corpora.metadata import HALF_A_CHARACTER, is_text
from data_pipelines.planning.row_drawing import Instance
from data_pipelines.traces.trace_files import Sidecar
from rcot_rl.errors import InputError
from rcot_rl.protocol.control_tokens import neutralize

TraceKey = tuple[str, str, str, str, str]
_NO_TRACE = (
    "no trace of this instance: corpora or recipe have changed since, so that others are drawn; "
    "`rcot data trace` asks for what is missing"
)


def response(think: str, answer: str, own: tuple[str, ...] = ()) -> str:
    """Return a well-formed response, control tokens and tags in its reasoning neutralized.

    own: further control tokens of the policy's tokenizer.
    """
    return f"<think>{neutralize(think, own)}</think>\n<answer>{answer}</answer>"


class Describer(Protocol):
    def description(self, corpus: int, dataset: str, video: str) -> str:
        """The video's description. Raises InputError when there is none."""

    def fingerprint(self) -> str:
        """Changes when any description may have changed."""


@dataclass(frozen=True)
class FileDescriptions:
    """From a JSONL file of {"dataset", "video", "description"}."""

    path: Path
    texts: Mapping[tuple[str, str], str]
    digest: str

    def description(self, corpus: int, dataset: str, video: str) -> str:
        if (dataset, video) not in self.texts:
            raise InputError("no description of this video", file=self.path, key=video)
        return self.texts[dataset, video]

    def fingerprint(self) -> str:
        return self.digest


@dataclass(frozen=True)
class SidecarDescriptions:
    """From the toy corpora themselves."""

    sidecars: Sequence[Sidecar]

    def description(self, corpus: int, dataset: str, video: str) -> str:
        return self.sidecars[corpus].description(video)

    def fingerprint(self) -> str:
        return "".join(s.digest for s in self.sidecars)


def open_descriptions(describe: str, corpora: Sequence[Corpus]) -> Describer:
    """What `data.describe` names. Raises InputError."""
    if describe == "template":
        return SidecarDescriptions(open_sidecars(corpora, "describe"))
    path = Path(describe)
    lines, digest = _read(path, ("dataset", "video", "description"))
    # an empty one is the describer's fault, and as good as none
    texts = {(r["dataset"], r["video"]): r["description"] for r in lines if r["description"]}
    return FileDescriptions(path, texts, digest)


@dataclass(frozen=True)
class FileTraces:
    """From a JSONL file of {"task", "dataset", "video", "expression_id", "frame", "response"}.

    Lines that say `"accepted": false`, with their `causes`, are responses that were not kept.
    """

    path: Path
    responses: Mapping[TraceKey, str]
    refused: Mapping[TraceKey, tuple[str, ...]]
    """Instances of which every response was refused -> the causes of the last refusal."""
    figures: Mapping[str, Any]
    """Responses asked for and kept, and refusals by cause."""
    digest: str

    def response_for(self, instance: Instance, frame: str) -> str:
        """The response of this instance. Raises InputError when there is none."""
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
    """What `data.trace` names. Raises InputError."""
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
    figures = {task: dict(sorted(count.items())) for task, count in sorted(counts.items())}
    return FileTraces(path, responses, refused, figures, digest)


def open_sidecars(corpora: Sequence[Corpus], key: str) -> list[Sidecar]:
    """The toy.json of every corpus. Raises InputError for a corpus that has none."""
    found = []
    for corpus in corpora:
        path = corpus.root / "toy.json"
        if not path.is_file():
            raise InputError(
                f"only a toy corpus (with a toy.json) has templates, not {corpus.root}; "
                f"give data.{key} the path of a JSONL file (see `rcot data {key}`)",
                key=f"data.{key}",
            )
        found.append(Sidecar.read(path))
    return found


def _read(path: Path, names: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """The lines of a JSONL file, each with these string keys, and the file's sha256."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except FileNotFoundError as error:
        raise InputError("no such file", file=path) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", file=path) from error
    out = []
    # Not splitlines(): JSON strings may hold the other characters that it breaks lines at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            # ValueError: an integer of very many digits, too
            raise InputError("not valid JSON", file=path, line=number) from error
        for name in names:
            if not isinstance(item, dict) or not isinstance(item.get(name), str):
                raise InputError("missing, or not a string", file=path, line=number, key=name)
            if not is_text(item[name]):
                raise InputError(HALF_A_CHARACTER, file=path, line=number, key=name)
        out.append(item)
    return out, hashlib.sha256(raw).hexdigest()

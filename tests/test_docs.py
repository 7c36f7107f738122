"""README and docs: the paths, commands and recipe keys that they name exist."""

from __future__ import annotations

import fnmatch
import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from rcot_rl.cli.main import app
from rcot_rl.recipe.reference import recipe_keys

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("rcot_rl", "cluster", "data_pipelines", "reward_fns", "recipes", "tests", "benchmarks")
PAGES = sorted(
    {ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")}
    - {ROOT / "docs" / "recipe-keys.md"}
)

FILES = [
    f"/{path.relative_to(ROOT)}"
    for top in (*TOPS, "docs", "requirements")
    for path in (ROOT / top, *(ROOT / top).rglob("*"))
]
PATH = re.compile(
    rf"(?:{'|'.join(TOPS)}|docs|requirements)/[\w./{{}},*-]*|[\w./{{}},-]+\.(?:py|sh|lock|yaml)"
)
EXAMPLE = re.compile(r"(mine|my_\w+|FILE|OTHER|RUN)\b")
"""Files of the reader's own."""

KEYS = [doc.key for doc in recipe_keys()]
SECTIONS = tuple(sorted({key.split(".")[0] for key in KEYS if "." in key} | {"grpo"}))
KEY = re.compile(rf"((?:{'|'.join(SECTIONS)})\.[\w.<>-]+)(?:[=:].*)?")
KNOWN_KEYS = re.compile(
    "|".join(re.sub("<.*?>", r"[\\w<>-]+", re.escape(key.replace("[]", ""))) for key in KEYS)
)

DEFAULTS = {"score": "responses", "study": "run"}
"""Command group -> the command that it runs if none is named."""


def prose(page: Path) -> str:
    """Text of a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def expanded(text: str) -> list[str]:
    """Return the words that braces stand for: `a/b` and `a/c` for `a/{b,c}`."""
    parts = [part.split(",") for part in re.split(r"[{}]", text)]
    return ["".join(choice) for choice in itertools.product(*parts)]


def missing_paths(text: str) -> list[str]:
    """Paths in code spans that no file or folder of the repository has, or ends with."""
    found = [span.split(":")[0] for span in re.findall(r"`([^`\n]+)`", text)]
    paths = {path for span in found if PATH.fullmatch(span) for path in expanded(span)}
    return [
        path
        for path in sorted(paths)
        if not EXAMPLE.match(path) and not fnmatch.filter(FILES, f"*/{path.rstrip('/')}")
    ]


def command_lines(text: str) -> list[list[str]]:
    """Words of the `rcot` commands in code spans and code blocks, without comments."""
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^ *(?:\.venv/bin/)?rcot ([\w-]+|[\w-]+ .+|\{.+)$", text, re.M)
    lines += re.findall(r"`rcot ([^`\n]+)`", text)
    return [shlex.split(line, comments=True) for line in lines]


def unknown_words(words: list[str]) -> list[str]:
    """Subcommands and options of a command line that `rcot` does not have."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        if not words or words[0] == "…":
            return []
        names = expanded(words[0])
        if command.name in DEFAULTS and names[0] not in command.commands:
            names = [DEFAULTS[command.name]]  # the word is an argument
        else:
            words = words[1:]
        if any(name not in command.commands for name in names):
            return names
        command = command.commands[names[0]]
    known = {option for parameter in command.params for option in parameter.opts}
    options = [word.strip("[]") for word in words if word.strip("[]").startswith("--")]
    return [option for option in options if option not in known]


def unknown_keys(text: str) -> list[str]:
    """Recipe keys in code spans and in commands' overrides that the schema does not have."""
    named = [m[1] for span in re.findall(r"`([^`\n]+)`", text) if (m := KEY.fullmatch(span))]
    named += [m[1] for words in command_lines(text) for w in words if (m := KEY.fullmatch(w))]
    return [key for key in named if not is_key(key)]


def is_key(key: str) -> bool:
    """Return True if the recipe has this key or section, or if it is a module of this name."""
    schema_key = re.sub(r"^grpo\.", "train.<grpo>.", key)
    section = any(known.startswith(f"{schema_key}.") for known in KEYS)
    module = any((ROOT / Path(*key.split(".")[:n])).with_suffix(".py").is_file() for n in (2, 3, 4))
    verl = re.match(r"train\.[\w<>-]+\.verl\.", schema_key)
    return bool(KNOWN_KEYS.fullmatch(schema_key)) or section or module or verl is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_commands_and_recipe_keys_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert missing_paths(prose(page)) == []
    assert [words for words in command_lines(text) if unknown_words(words)] == []
    if page.name == "preflight.md":  # its tables list codes of findings, which look like keys
        text = re.sub(r"^\|.*$", "", text, flags=re.M)
    assert unknown_keys(text) == []


def test_links_of_readme_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_api_page_names_functions_and_classes_that_exist() -> None:
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.M):
        module, _, member = name.rpartition(".")
        source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        assert re.search(rf"^(class|def) {member}\b", source, re.M), name


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (missing_paths, "`rcot_rl/no_such_room/`"),
        (missing_paths, "`no_such_file.py`"),
        (unknown_keys, "`grpo.no_such_key`"),
        (unknown_keys, "`rcot run laptop train.grpo-ktg.no_such_key=1`"),
    ],
)
def test_a_wrong_name_is_noticed(check, text) -> None:
    assert len(check(text)) == 1


def test_a_wrong_command_is_noticed() -> None:
    assert unknown_words(["no-such-command", "x"]) == ["no-such-command"]
    assert unknown_words(["run", "laptop", "--no-such-option"]) == ["--no-such-option"]

"""Parts of the HTML pages: escaping, tables, sections, colours and the whole document.

A page is one file that loads nothing. Its content security policy allows embedded pictures and
videos, its own style sheet, and the scripts that were given to `page`, by their hashes. All text of
a run (queries, responses, names) passes through `text`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
    "base-uri 'none'; form-action 'none'"
)
_SECTION = re.compile(r'<section id="([\w-]+)" [^>]*><h2 [^>]*>(.*?)</h2>')


def text(value: object, most: int = 4000) -> str:
    """Return `value` as HTML text: escaped, without control characters, `most` characters long."""
    plain = str(value)
    excess = len(plain) - most
    plain = plain[:most].encode("utf-8", "replace").decode("utf-8")
    plain = html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", plain))
    return plain + (f" … ({excess} more characters)" if excess > 0 else "")


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: int = 1,
    caption: str = "",
    classes: Sequence[str] = (),
    secondary: Sequence[int] = (),
) -> str:
    """Return a table of HTML cells, whose first column names the rows.

    On a narrow screen, a table of more than three columns becomes one card per row, unless it has
    `secondary` columns, which are then hidden.

    Args:
        head: Column names; HTML.
        rows: Cells; HTML.
        numbers: Index of the first right-aligned column.
        caption: What the table shows; HTML.
        classes: CSS class of each row; empty: none.
        secondary: Indices of the columns that a narrow screen hides.
    """
    cards = len(head) > 3 and not secondary
    roles = {tag: f' role="{tag}"' if cards else "" for tag in ("table", "rowgroup", "row", "cell")}

    def style(column: int) -> str:
        names = ["n"] if column >= numbers else []
        names += ["narrow-off"] if column in secondary else []
        return f' class="{" ".join(names)}"' if names else ""

    def row(cells: Sequence[str], kind: str) -> str:
        first, *others = cells
        role = ' role="rowheader"' if cards else ""
        line = f'<th scope="row"{role}{style(0)}>{first}</th>'
        for column, (name, value) in enumerate(zip(head[1:], others, strict=True), start=1):
            label = f' data-label="{text(_plain(name))}"' if cards else ""
            # One element, so that a card has two columns: the label and the whole cell.
            content = f"<span>{value}</span>" if cards else value
            line += f"<td{roles['cell']}{style(column)}{label}>{content}</td>"
        return f"<tr{roles['row']}{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{line}</tr>"

    role = ' role="columnheader"' if cards else ""
    top = "".join(f'<th scope="col"{role}{style(k)}>{name}</th>' for k, name in enumerate(head))
    kinds = classes or [""] * len(rows)
    body = "".join(row(cells, kind) for cells, kind in zip(rows, kinds, strict=True))
    title = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="wide"><table{roles["table"]}{" class=cards" if cards else ""}>{title}'
        f"<thead{roles['rowgroup']}><tr{roles['row']}>{top}</tr></thead>"
        f"<tbody{roles['rowgroup']}>{body}</tbody></table></div>"
    )


def section(title: str, *parts: str) -> str:
    """Return a section of the page; neither the title nor the parts are escaped.

    The page's contents link to it. Two sections of a page must have different titles.
    """
    anchor = re.sub(r"[^a-z0-9]+", "-", _plain(title).lower()).strip("-")[:60] or "section"
    return (
        f'<section id="{anchor}" aria-labelledby="{anchor}-title">'
        f'<h2 id="{anchor}-title">{title}</h2>{"".join(parts)}</section>'
    )


def missing(name: str) -> str:
    """Return the note that stands in the place of something missing."""
    return f'<p class="missing">Missing: {text(name)}</p>'


def details(summary: str, body: str) -> str:
    """Return a body to unfold below a summary; both are HTML."""
    return f"<details><summary>{summary}</summary>{body}</details>"


def folds(*parts: str) -> str:
    """Return bodies to unfold, made by `details`, side by side while they are folded."""
    return f'<div class="folds">{"".join(parts)}</div>' if any(parts) else ""


def page(
    title: str,
    body: str,
    header: str = "",
    scripts: Sequence[str] = (),
    styles: Sequence[str] = (),
) -> str:
    """Return the whole document, with a table of contents of the sections in `body`.

    Args:
        title: Title of the window; escaped here.
        body: HTML; sections are made by `section`.
        header: HTML above the contents, with the page's only `<h1>`; empty: the title.
        scripts: JavaScript, which is allowed by its hash; nothing else can run.
        styles: Style sheets after the page's own.

    Raises:
        ValueError: if a script or a style sheet would end its element.
    """
    for inserted in (*scripts, *styles):
        if "</" in inserted:
            raise ValueError("a script or style sheet of a page must not contain '</'")
    policy = _POLICY
    if scripts:
        policy += f"; script-src {' '.join(map(_hash_source, scripts))}"
    links = "".join(
        f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name in _SECTION.findall(body)
    )
    contents = f'<nav class="contents" aria-label="Contents"><ol>{links}</ol></nav>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{text(title)}</title><style>{''.join((_style(), *styles))}</style></head>"
        '<body><a class="skip" href="#content">Skip to the content</a><div class="layout">'
        f'<header class="top">{header or f"<h1>{text(title)}</h1>"}</header>{contents}'
        f'<main id="content" tabindex="-1">{body}</main></div>'
        f"{''.join(f'<script>{script}</script>' for script in scripts)}</body></html>\n"
    )


LIGHT = {
    "page": "#fafaf8",
    "card": "#ffffff",
    "ink": "#1c1d1f",
    "soft": "#5c5f66",
    "line": "#e0e1de",
    "good": "#18794e",
    "bad": "#b42318",
    "warn": "#855700",
    "warn-back": "#fdf4e0",
    "s1": "#2563b8",
    "s2": "#c2570c",
    "s3": "#0f7f6b",
    "s4": "#9333a8",
    "s5": "#b3263f",
    "s6": "#6b6f12",
}
"""The page's colours by CSS variable; `s1` to `s6` are those of curves."""

DARK = {
    "page": "#131416",
    "card": "#1b1d20",
    "ink": "#e8e8e6",
    "soft": "#a3a6ac",
    "line": "#303338",
    "good": "#4cc38a",
    "bad": "#ff8a7a",
    "warn": "#f0c56b",
    "warn-back": "#2c2413",
    "s1": "#6ea8ff",
    "s2": "#ff9a52",
    "s3": "#43c9ae",
    "s4": "#d18be4",
    "s5": "#ff7d92",
    "s6": "#c5ca55",
}
"""The same variables on a dark screen."""


def _plain(markup: str) -> str:
    """Return the text of HTML that this package made."""
    return html.unescape(re.sub(r"<[^>]*>", " ", markup)).strip()


def _hash_source(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _variables(colours: Mapping[str, str]) -> str:
    return ":root { " + " ".join(f"--{name}: {c};" for name, c in colours.items()) + " }\n"


@cache
def _style() -> str:
    return (
        ":root { color-scheme: light dark; }\n"
        + _variables(LIGHT)
        + f"@media screen and (prefers-color-scheme: dark) {{ {_variables(DARK)} }}\n"
        + files("rcot_rl.monitoring.pages").joinpath("page.css").read_text(encoding="utf-8")
    )

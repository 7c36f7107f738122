"""Parts of the HTML pages: escaping, tables, colours and the style sheet.

A page is one file without scripts, and it loads nothing; its content security policy forbids both.
All text of a run (queries, responses, names) passes through `text`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def text(value: object, most: int = 4000) -> str:
    """Return `value` as HTML text: escaped, without control characters, `most` characters long."""
    plain = str(value)
    excess = len(plain) - most
    plain = plain[:most].encode("utf-8", "replace").decode("utf-8")
    plain = html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", plain))
    return plain + (f" … ({excess} more characters)" if excess > 0 else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 1) -> str:
    """Return a table of HTML cells; columns from index `numbers` on are right-aligned."""

    def line(cells: Sequence[str], tag: str) -> str:
        classes = ["" if i < numbers else ' class="n"' for i in range(len(cells))]
        return "".join(f"<{tag}{c}>{v}</{tag}>" for c, v in zip(classes, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{line(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def section(title: str, *parts: str) -> str:
    """Return a section of the page; neither the title nor the parts are escaped."""
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def missing(name: str) -> str:
    """Return the note that stands in the place of something missing."""
    return f'<p class="missing">Missing: {text(name)}</p>'


def details(summary: str, body: str) -> str:
    """Return a body to unfold below a summary; both are HTML."""
    return f"<details><summary>{summary}</summary>{body}</details>"


def page(title: str, body: str) -> str:
    """Return the whole document; `title` is escaped here, `body` is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


LIGHT = {
    "page": "#fbfbfa",
    "card": "#ffffff",
    "ink": "#1c1d1f",
    "soft": "#66696f",
    "line": "#e2e3e1",
    "good": "#18794e",
    "bad": "#b42318",
    "warn": "#8a5a00",
    "warn-back": "#fdf4e0",
    "s1": "#2563b8",
    "s2": "#c2570c",
    "s3": "#0f7f6b",
    "s4": "#9333a8",
    "s5": "#b3263f",
    "s6": "#6b6f12",
}
"""The page's colours by CSS variable; `s1` to `s6` are those of curves."""

_DARK = {
    "page": "#131416",
    "card": "#1b1d20",
    "ink": "#e8e8e6",
    "soft": "#9a9da3",
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


def _variables(colours: Mapping[str, str]) -> str:
    return ":root { " + " ".join(f"--{name}: {c};" for name, c in colours.items()) + " }"


_STYLE = (
    f"""
:root {{ color-scheme: light dark; }}
{_variables(LIGHT)}
@media (prefers-color-scheme: dark) {{ {_variables(_DARK)} }}
"""
    + """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 24px 0 8px; }
p { margin: 6px 0; max-width: 80ch; }
.soft, figcaption .keys, small { color: var(--soft); }
small { display: block; font-size: 12px; font-weight: 400; }
code, pre { font: 12.5px/1.45 ui-monospace, "SF Mono", Menlo, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0 10px; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; margin: 8px 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { font-weight: 500; font-size: 13px; color: var(--soft); }
th.n, td.n { text-align: right; }
td.n, td:first-child { white-space: nowrap; }
.up { color: var(--good); } .down { color: var(--bad); }
.bar { display: inline-block; width: 60px; height: 8px; margin-right: 10px; border-radius: 2px;
  background: var(--line); vertical-align: middle; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--s1); }
.bar.plain i { background: var(--soft); }
.missing { color: var(--warn); background: var(--warn-back); padding: 6px 12px; border-radius: 6px;
  max-width: none; }
.grid-of { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px; min-width: 0; }
figcaption { font-size: 13px; font-weight: 600; margin-bottom: 6px; overflow-wrap: anywhere; }
.keys { display: flex; flex-wrap: wrap; gap: 0 12px; font-weight: 400; font-size: 12px; }
.key::before { content: ""; display: inline-block; width: 10px; height: 3px; border-radius: 1px;
  margin-right: 5px; vertical-align: middle; background: var(--key); }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round; overflow: hidden; }
.frame { display: grid; border-radius: 4px; margin-bottom: 8px; overflow: hidden; }
.frame > * { grid-area: 1 / 1; width: 100%; height: 100%; }
.frame img { display: block; image-rendering: pixelated; }
.mark { white-space: nowrap; }
.swatch { display: inline-block; width: 18px; height: 0; margin: 0 5px 0 12px;
  vertical-align: middle; border-top: 3px solid; }
.swatch.truth { border-top: 3px dashed var(--soft); } .swatch.pred { border-color: #ff3d8b; }
.swatch.box { border-color: #12b5d0; } .swatch.point { width: 9px; height: 9px; border: 0;
  border-radius: 50%; background: #e0b800; }
details { margin: 6px 0; } summary { cursor: pointer; color: var(--soft); font-size: 13px; }
"""
)

"""The report's HTML: escaping, tables, and the style sheet. One file, nothing fetched, no script.

Everything that comes from a run (queries, answers of the model, names) passes through `text`. The
page also forbids itself scripts and foreign resources by its content security policy.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def text(value: object, most: int = 4000) -> str:
    """`value` as HTML text: escaped, without control characters, cut after `most` characters."""
    plain = str(value)
    cut = len(plain) - most
    plain = plain[:most].encode("utf-8", "replace").decode("utf-8")
    plain = html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", plain))
    return plain + (f" … ({cut} more characters)" if cut > 0 else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 1) -> str:
    """A table of HTML cells; columns from `numbers` on are right-aligned."""

    def line(cells: Sequence[str], tag: str) -> str:
        classes = ["" if i < numbers else ' class="n"' for i in range(len(cells))]
        return "".join(f"<{tag}{c}>{v}</{tag}>" for c, v in zip(classes, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{line(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def section(title: str, *parts: str) -> str:
    """A titled part of the page; titles are ours, parts are HTML."""
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def missing(what: str) -> str:
    """A line that says, in the place of something, that it is not there."""
    return f'<p class="missing">Missing: {text(what)}</p>'


def details(summary: str, body: str) -> str:
    """Something to unfold; both are HTML."""
    return f"<details><summary>{summary}</summary>{body}</details>"


def page(title: str, body: str) -> str:
    """The whole document; `title` is escaped here, `body` is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1c1d1f; --soft: #66696f;
  --line: #e2e3e1; --good: #18794e; --bad: #b42318; --warn: #8a5a00; --warn-back: #fdf4e0;
  --s1: #2563b8; --s2: #c2570c; --s3: #0f7f6b; --s4: #9333a8; --s5: #b3263f; --s6: #6b6f12; }
@media (prefers-color-scheme: dark) { :root { --page: #131416; --card: #1b1d20; --ink: #e8e8e6;
  --soft: #9a9da3; --line: #303338; --good: #4cc38a; --bad: #ff8a7a; --warn: #f0c56b;
  --warn-back: #2c2413; --s1: #6ea8ff; --s2: #ff9a52; --s3: #43c9ae; --s4: #d18be4;
  --s5: #ff7d92; --s6: #c5ca55; } }
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
th, td { padding: 7px 12px; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { font-weight: 500; font-size: 13px; color: var(--soft); }
th.n, td.n { text-align: right; }
.up { color: var(--good); } .down { color: var(--bad); }
.bar { display: inline-block; width: 90px; height: 8px; margin-right: 10px; border-radius: 2px;
  background: var(--line); vertical-align: middle; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--s1); }
.bar.plain i { background: var(--soft); }
.missing { color: var(--warn); background: var(--warn-back); padding: 6px 12px; border-radius: 6px;
  max-width: none; }
.grid-of { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px; min-width: 0; }
figcaption { font-size: 13px; font-weight: 600; margin-bottom: 6px; overflow-wrap: anywhere; }
.keys { display: flex; flex-wrap: wrap; gap: 0 12px; font-weight: 400; font-size: 12px; }
.key::before { content: ""; display: inline-block; width: 10px; height: 3px; border-radius: 1px;
  margin-right: 5px; vertical-align: middle; background: currentColor; }
.key.s1::before { background: var(--s1); } .key.s2::before { background: var(--s2); }
.key.s3::before { background: var(--s3); } .key.s4::before { background: var(--s4); }
.key.s5::before { background: var(--s5); } .key.s6::before { background: var(--s6); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg path { fill: none; stroke-linejoin: round; }
svg .line { stroke-width: 2; } svg .thin { stroke-width: 1; opacity: .35; }
path.s1 { stroke: var(--s1); } path.s2 { stroke: var(--s2); } path.s3 { stroke: var(--s3); }
path.s4 { stroke: var(--s4); } path.s5 { stroke: var(--s5); } path.s6 { stroke: var(--s6); }
.dot.s1 { fill: var(--s1); } .dot.s2 { fill: var(--s2); } .dot.s3 { fill: var(--s3); }
.dot.s4 { fill: var(--s4); } .dot.s5 { fill: var(--s5); } .dot.s6 { fill: var(--s6); }
.shot svg { border-radius: 4px; margin-bottom: 8px; }
.shot image { image-rendering: pixelated; }
.shot path, .shot rect { fill: none; vector-effect: non-scaling-stroke; stroke-width: 2; }
.shot .truth, i.truth { stroke: #fff; stroke-dasharray: 5 4; }
.shot .under { stroke: #000; stroke-width: 2; opacity: .6; }
.shot .pred { stroke: #ff3d8b; } .shot .box { stroke: #27e0ff; }
.shot .point { fill: #ffe14a; stroke: #000; stroke-width: 1; vector-effect: non-scaling-stroke; }
.swatch { display: inline-block; width: 18px; height: 0; margin: 0 5px 0 12px;
  vertical-align: middle; border-top: 3px solid; }
.swatch.truth { border-top: 3px dashed var(--soft); } .swatch.pred { border-color: #ff3d8b; }
.swatch.box { border-color: #12b5d0; } .swatch.point { width: 9px; height: 9px; border: 0;
  border-radius: 50%; background: #e0b800; }
details { margin: 6px 0; } summary { cursor: pointer; color: var(--soft); font-size: 13px; }
"""

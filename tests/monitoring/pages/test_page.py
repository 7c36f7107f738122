"""Parts of the pages: tables, contents, colours, and what may run."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from rcot_rl.monitoring.pages.page import DARK, LIGHT, page, section, table


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("text", ["ink", "soft", "good", "bad", "warn", "s1"])
@pytest.mark.parametrize("back", ["page", "card", "warn-back"])
def test_texts_have_a_contrast_of_at_least_4_5(colours, text: str, back: str) -> None:
    light, dark = sorted((luminance(colours[text]), luminance(colours[back])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_curves_stand_out_from_their_card(colours) -> None:
    for k in range(1, 7):
        pair = (luminance(colours[f"s{k}"]), luminance(colours["card"]))
        assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 3


def test_only_the_given_scripts_can_run() -> None:
    script = "document.title = 'ü';"
    html = page("t", section("A", "<p>x</p>"), scripts=[script])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall('Content-Security-Policy" content="([^"]*)"', html)
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert re.findall("<script>(.*?)</script>", html) == [script]
    assert "script-src" not in page("t", "")
    for kind in ("scripts", "styles"):
        with pytest.raises(ValueError, match="must not contain"):
            page("t", "", **{kind: ["a </script><script>alert(1)"]})


def test_the_contents_link_to_each_section() -> None:
    html = page("t", section("Mean J&amp;F", "1") + section("Training: <b>x</b>", "2"))
    links = re.findall('<li><a href="#([^"]+)">(.*?)</a></li>', html)
    assert links == [("mean-j-f", "Mean J&amp;F"), ("training-x", "Training: <b>x</b>")]
    for anchor, _ in links:
        assert f'<section id="{anchor}" aria-labelledby="{anchor}-title">' in html
        assert html.count(f'id="{anchor}"') == 1 and f'<h2 id="{anchor}-title">' in html
    assert html.index('class="skip"') < html.index("<nav") < html.index("<main")


def test_tables_name_rows_and_columns() -> None:
    html = table(["", "a", "J&amp;F"], [["x", "1", "2"]], caption="c", secondary=[2])
    assert '<th scope="row">x</th>' in html and '<th scope="col" class="n">a</th>' in html
    assert "<caption>c</caption>" in html and "data-label" not in html
    assert html.count('class="n narrow-off"') == 2, "a narrow screen hides head and cell"


def test_wide_tables_become_cards_that_keep_their_roles() -> None:
    """Changing the display of a table removes its semantics, unless it has roles."""
    html = table(["", "a", "b", "J&amp;F<small>x</small>"], [["x", "1", "2", "3"]])
    assert 'data-label="J&amp;F x"' in html and 'role="table"' in html
    assert html.count('role="row"') == 2 and html.count('role="cell"') == 3
    assert html.count('role="columnheader"') == 4 and html.count('role="rowheader"') == 1

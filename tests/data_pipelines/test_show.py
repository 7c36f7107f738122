"""Pictures show the rows' ground truth, and files of other kinds are refused."""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines.build import build as build_shards
from data_pipelines.verify.show import contact_sheet, drawn, page, read_shown
from rcot_rl.errors import InputError
from rcot_rl.recipe.data_section import CorpusRef, DataSection, SetSize

build = partial(build_shards, canvas=84)


@pytest.fixture
def shard(corpus_maker, tmp_path):
    corpus = corpus_maker("mevis", "train", n_videos=10)
    data = DataSection(
        corpora=[CorpusRef(dataset="mevis", root=str(corpus.root))],
        sets={"sft-x": SetSize(ktg=12, aks=8)},
        allow_smaller=True,
    )
    build(data, tmp_path / "out", "qwen")
    return tmp_path / "out" / "sft-x" / "train-00000-of-00001.parquet"


def test_boxes_and_points_are_drawn_where_the_truth_says(shard):
    shown = next(s for s in read_shown(shard, limit=20) if not isinstance(s.truth, str))
    picture = np.asarray(drawn(shown, 840)).astype(int)
    plain = np.asarray(shown.image.resize((840, 840))).astype(int)
    changed = np.abs(picture - plain).sum(axis=2) > 30
    x1, y1, x2, y2 = (10 * v for v in shown.truth[0]["bbox_2d"])
    assert changed[y1, x1 + 2 : x2 - 2].mean() > 0.8
    assert changed[y1 + 2 : y2 - 2, x2 - 1].mean() > 0.8
    x, y = (10 * v for v in shown.truth[0]["point_2d"])
    assert changed[y - 2 : y + 3, x - 2 : x + 3].mean() > 0.8


def test_varied_rows_cover_all_kinds_and_chosen_rows_are_read(shard):
    kinds = {(s.info["task"], str(s.truth)[0]) for s in read_shown(shard, limit=4, varied=True)}
    assert {("aks", "A"), ("aks", "B")} <= kinds and len(kinds) >= 3
    assert [s.number for s in read_shown(shard, [5, 2])] == [2, 5]
    with pytest.raises(InputError, match="no row 99"):
        read_shown(shard, [99])


def test_contact_sheet_and_page_hold_every_row(shard):
    rows = read_shown(shard, limit=5)
    with Image.open(io.BytesIO(contact_sheet(rows, columns=3, side=100))) as sheet:
        assert sheet.width == 3 * 108 + 8
    text = page(rows, "<b>title</b>")
    assert text.count("<article>") == 5 and "<b>title</b>" not in text
    assert "&lt;image&gt;" in text and "src='http" not in text


def test_parquet_files_of_other_schemas_are_refused(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(InputError, match="not a row"):
        read_shown(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a readable parquet"):
        read_shown(path)

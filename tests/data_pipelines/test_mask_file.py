"""Members of a large JSON object are located for any size of the pieces read."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.corpora.mask_file import MaskFile, members
from rcot_rl.errors import InputError

texts = st.text(st.characters(max_codepoint=126), max_size=6)
values = st.recursive(
    st.none() | st.integers(-1000, 1000) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=6,
)


@given(st.dictionaries(texts, values, max_size=5), st.integers(1, 40), st.sampled_from([None, 1]))
def test_members_are_those_of_the_document(document, piece, indent):
    data = json.dumps(document, indent=indent).encode() + b" \n"
    parsed = {n: json.loads(data[a : a + k]) for n, a, k in members(io.BytesIO(data), piece)}
    assert parsed == document
    assert list(parsed) == list(document)


@given(st.binary(max_size=12), st.integers(1, 9))
def test_documents_that_are_not_one_object_are_refused(data, piece):
    try:
        whole = json.loads(data.decode("ascii"))
    except ValueError:
        whole = None
    try:
        parsed = {n: json.loads(data[a : a + k]) for n, a, k in members(io.BytesIO(data), piece)}
    except ValueError:
        parsed = None
    assert parsed == (whole if isinstance(whole, dict) else None)


def test_a_mask_file_returns_its_members_only(tmp_path):
    path = tmp_path / "mask_dict.json"
    path.write_text(json.dumps({str(k): [None, {"counts": f"{k}[]"}] for k in range(200)}))
    masks = MaskFile(path)
    for k in (0, 199, 3, 0):
        assert masks.get(str(k)) == [None, {"counts": f"{k}[]"}]
    assert masks.get("200") is None


@pytest.mark.parametrize("text", ["[1]", "", "{", '{"a": 1} 2', "nonsense"])
def test_invalid_mask_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "mask_dict.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        MaskFile(path)
    assert caught.value.file.endswith("mask_dict.json")


def test_a_file_that_is_not_ascii_is_read_whole(tmp_path):
    path = tmp_path / "mask_dict.json"
    path.write_text('{"é": [1]}', encoding="utf-8")
    assert MaskFile(path).get("é") == [1]


def test_a_file_that_changed_after_indexing_is_named(tmp_path):
    path = tmp_path / "mask_dict.json"
    path.write_text('{"a": [1, 2, 3]}')
    masks = MaskFile(path)
    path.write_text("{}")
    with pytest.raises(InputError, match="changed"):
        masks.get("a")

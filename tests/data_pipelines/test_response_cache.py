"""Stored responses survive a kill at any byte and are never reused for other requests."""

from __future__ import annotations

import json

import pytest

from data_pipelines.traces.response_cache import ResponseCache, write_lines
from rcot_rl.errors import InputError

WHO = {"model": "m", "seed": 1}


def test_stored_responses_are_read_back(tmp_path):
    path = tmp_path / "a" / "responses.jsonl"
    with ResponseCache(path, WHO) as cache:
        cache.add("k1", {"response": "a\nb \u2028 c \ud800", "tokens": 3})
        assert "k1" in cache
        with pytest.raises(ValueError, match="already"):
            cache.add("k1", {"response": ""})
    with ResponseCache(path, WHO) as again:
        assert again.records["k1"]["tokens"] == 3
        assert again.records["k1"]["response"].startswith("a\nb \u2028 c ")


def test_a_kill_at_any_byte_costs_at_most_the_line_it_cut(tmp_path):
    path = tmp_path / "responses.jsonl"
    with ResponseCache(path, WHO) as cache:
        for k in range(3):
            cache.add(f"k{k}", {"response": f"r{k}"})
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with ResponseCache(path, WHO) as cache:
            left = set(cache.records)
            assert left == {f"k{k}" for k in range(max(0, whole[:cut].count(b"\n") - 1))}
            for k in range(3):
                if f"k{k}" not in cache:
                    cache.add(f"k{k}", {"response": f"r{k}"})
        assert path.read_bytes() == whole


def test_another_identity_is_refused(tmp_path):
    path = tmp_path / "responses.jsonl"
    ResponseCache(path, WHO).__exit__(None, None, None)
    with pytest.raises(InputError, match="seed = 1, not 2"):
        ResponseCache(path, {**WHO, "seed": 2})


@pytest.mark.parametrize("line", ["{", "[]", '{"response": 1}', "[" * 100000])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "responses.jsonl"
    path.write_text(json.dumps({"ledger": WHO}) + "\n" + line + "\n")
    with pytest.raises(InputError) as error:
        ResponseCache(path, WHO)
    assert error.value.line == 2


def test_write_lines_is_atomic(tmp_path):
    write_lines(tmp_path / "x.jsonl", [{"a": "é"}, {"b": 1}])
    assert [json.loads(r) for r in (tmp_path / "x.jsonl").read_text().splitlines()] == [
        {"a": "é"},
        {"b": 1},
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_cache_is_open_in_one_process_at_a_time(tmp_path):
    path = tmp_path / "responses.jsonl"
    with ResponseCache(path, WHO) as first:
        first.add("a", {"response": "x"})
        with pytest.raises(InputError, match="another command"):
            ResponseCache(path, WHO)
        first.add("b", {"response": "y"})
    with ResponseCache(path, WHO) as second:
        assert list(second.records) == ["a", "b"]

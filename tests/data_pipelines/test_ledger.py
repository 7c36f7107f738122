"""What was answered stays answered: over kills at any byte, and never for another question."""

from __future__ import annotations

import json

import pytest

from data_pipelines.traces.response_cache import Ledger, write_lines
from rcot_rl.errors import InputError

WHO = {"model": "m", "seed": 1}


def test_answers_come_back(tmp_path):
    path = tmp_path / "a" / "ledger.jsonl"
    with Ledger(path, WHO) as ledger:
        ledger.add("k1", {"response": "a\nb \u2028 c \ud800", "tokens": 3})
        assert "k1" in ledger
        with pytest.raises(ValueError, match="already"):
            ledger.add("k1", {"response": ""})
    with Ledger(path, WHO) as again:
        assert again.records["k1"]["tokens"] == 3
        assert again.records["k1"]["response"].startswith("a\nb \u2028 c ")


def test_a_kill_at_any_byte_costs_at_most_the_line_it_cut(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, WHO) as ledger:
        for k in range(3):
            ledger.add(f"k{k}", {"response": f"r{k}"})
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Ledger(path, WHO) as ledger:
            left = set(ledger.records)
            assert left == {f"k{k}" for k in range(max(0, whole[:cut].count(b"\n") - 1))}
            for k in range(3):
                if f"k{k}" not in ledger:
                    ledger.add(f"k{k}", {"response": f"r{k}"})
        assert path.read_bytes() == whole


def test_another_model_or_seed_does_not_go_on(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, WHO).__exit__(None, None, None)
    with pytest.raises(InputError, match="seed = 1, not 2"):
        Ledger(path, {**WHO, "seed": 2})


@pytest.mark.parametrize("line", ["{", "[]", '{"response": 1}', "[" * 100000])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps({"ledger": WHO}) + "\n" + line + "\n")
    with pytest.raises(InputError) as error:
        Ledger(path, WHO)
    assert error.value.line == 2


def test_lines_are_written_whole(tmp_path):
    write_lines(tmp_path / "x.jsonl", [{"a": "é"}, {"b": 1}])
    assert [json.loads(r) for r in (tmp_path / "x.jsonl").read_text().splitlines()] == [
        {"a": "é"},
        {"b": 1},
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, WHO) as first:
        first.add("a", {"response": "x"})
        with pytest.raises(InputError, match="another command"):
            Ledger(path, WHO)
        first.add("b", {"response": "y"})
    with Ledger(path, WHO) as second:
        assert list(second.records) == ["a", "b"]

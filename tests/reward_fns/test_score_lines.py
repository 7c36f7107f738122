"""`score_file` with recipes and users' functions: output lines and errors."""

import io
import json

import pytest

from rcot_rl.errors import InputError
from reward_fns import load_reward
from reward_fns.score_lines import score_file

GOOD = {"response": "<think>t</think><answer>A</answer>", "ground_truth": "A"}


def lines(path, rows):
    path.write_bytes(
        b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)
    )
    return path


def run(tmp_path, reward, rows):
    source, out = lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert score_file(str(reward), source, out) == len(rows)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_each_line_is_scored_in_order_and_keeps_its_other_keys(tmp_path):
    rows = [
        {"id": 7, **GOOD, "meta": {"b": [1.5, None], "a": "é漢"}},
        {"response": "A", "ground_truth": "B", "reward": 99, "uid": "\ud800"},
        {"response": None, "ground_truth": '"A"', "id": "last"},
    ]
    out = run(tmp_path, "aks", rows)
    assert list(out[0]) == ["reward", "components", "reasons", "id", "meta"]
    assert out[0] == {
        "reward": 3.0,
        "components": {"format": 1.0, "accuracy": 1.0},
        "reasons": [],
        "id": 7,
        "meta": rows[0]["meta"],
    }
    assert (out[1]["reward"], out[1]["uid"]) == (0.0, "\ud800")
    assert out[1]["reasons"] == ["think_missing", "answer_missing"]
    assert (out[2]["reward"], out[2]["id"]) == (0.0, "last")
    assert "response_not_text" in out[2]["reasons"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_joint_reads_the_data_source_of_each_line(tmp_path):
    gt = [{"bbox_2d": [1, 2, 30, 40], "point_2d": [9, 9]}]
    answer = f"<think>t</think><answer>{json.dumps(gt)}</answer>"
    rows = [
        {**GOOD, "data_source": "rcot/aks"},
        {"response": answer, "ground_truth": json.dumps(gt), "data_source": "rcot/ktg"},
    ]
    assert [row["reward"] for row in run(tmp_path, "joint", rows)] == [3.0, 6.0]


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"response": "\xff", "ground_truth": "A"}', "not valid JSON"),
        (b'{"response": "x", "ground_truth": "A", "x": NaN}', "not valid JSON"),
        (b'{"response": "x", "ground_truth": "A", "x": 1e999}', "does not fit"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["response", "ground_truth"]', "object"),
        ({"ground_truth": "A"}, "response: missing"),
        ({"response": "x"}, "ground_truth: missing"),
        ({"response": "x", "ground_truth": "C"}, "ground_truth: must be one of"),
    ],
)
def test_an_invalid_line_raises_with_its_number_and_leaves_no_file(tmp_path, bad, part):
    source, out = lines(tmp_path / "in.jsonl", [GOOD, GOOD, bad, GOOD]), tmp_path / "out.jsonl"
    with pytest.raises(InputError) as caught:
        score_file("aks", source, out)
    assert f"{source}:3: " in str(caught.value) and part in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    out.write_text("before")
    with pytest.raises(InputError):
        score_file("aks", source, out)
    assert out.read_text() == "before"


def test_the_last_line_needs_no_newline_and_output_may_replace_input(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(GOOD) + "\r\n" + json.dumps(GOOD))
    assert score_file("aks", path, path) == 2
    assert [json.loads(line)["reward"] for line in path.read_text().splitlines()] == [3.0, 3.0]
    empty = lines(tmp_path / "empty.jsonl", [])
    assert score_file("aks", empty, tmp_path / "none.jsonl") == 0


def test_none_stands_for_standard_input_and_output(monkeypatch, capfdbinary):
    class Text:
        buffer = io.BytesIO(json.dumps(GOOD).encode() + b"\n")

    monkeypatch.setattr("sys.stdin", Text)
    assert score_file("aks", None, None) == 1
    assert json.loads(capfdbinary.readouterr().out)["reward"] == 3.0
    Text.buffer = io.BytesIO(json.dumps(GOOD).encode() + b"\n{")
    with pytest.raises(InputError, match="<stdin>:2: not valid JSON"):
        score_file("aks", None, None)


def test_unreadable_and_unwritable_files_raise(tmp_path):
    source = lines(tmp_path / "in.jsonl", [GOOD])
    for given in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            score_file("aks", given, tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="cannot be written"):
        score_file("aks", source, tmp_path / "missing" / "out.jsonl")
    (tmp_path / "link").symlink_to("real.jsonl")
    assert score_file("aks", source, tmp_path / "link") == 1
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real.jsonl").is_file()


USER = """
from dataclasses import dataclass

@dataclass
class Config:
    factor: float = 2.0

def number(response, ground_truth):
    return len(response) * Config().factor

def parts(response, ground_truth, **kwargs):
    return {"reward": 1, "length": len(response), "rows": len(kwargs), "reasons": ["short"]}

def named(text, truth, id=None, canvas=0):
    return {"reward": id + canvas}

def fails(response, ground_truth, **kwargs):
    if "!" in response:
        raise ValueError("no")
    return {"reward": 2.0, "a": 1.0, "b": 0.5}

def leaves(response, ground_truth):
    raise SystemExit(3)

def bad(response, ground_truth):
    return eval(response)

def nested(response, ground_truth):
    return {"reward": 2, "components": {"a": 1, "b": 0.5}, "c": 3, "reasons": ["short"]}

def scored(response, ground_truth):
    return {"score": 2, "components": {"reward": 1}}

def lonely(response):
    return 1.0
"""


@pytest.fixture
def user(tmp_path):
    (tmp_path / "mine.py").write_text(USER)
    return f"{tmp_path}/mine.py"


def test_a_user_function_may_return_a_number_or_a_dict(tmp_path, user):
    rows = [{"response": "abc", "ground_truth": {"any": 1}, "id": 4, "truth": 5}]
    out = run(tmp_path, f"{user}:number", rows)
    assert out == [{"reward": 6.0, "components": {}, "reasons": [], "id": 4, "truth": 5}]
    out = run(tmp_path, f"{user}:parts", rows)
    assert (out[0]["reward"], out[0]["reasons"]) == (1.0, ["short"])
    assert out[0]["components"] == {"length": 3.0, "rows": 2.0}
    assert run(tmp_path, f"{user}:named", rows)[0]["reward"] == 4.0
    assert load_reward(f"{user}:named", canvas=112).score("", "", id=1).reward == 113.0


def test_a_user_function_may_return_nested_components(user):
    score = load_reward(f"{user}:nested").score("", None)
    assert (score.reward, score.reasons) == (2.0, ["short"])
    assert score.components == {"c": 3.0, "a": 1.0, "b": 0.5}
    named = load_reward(f"{user}:scored").score("", None)
    assert (named.reward, named.components) == (2.0, {"reward": 1.0})


def test_a_user_function_that_fails_costs_one_sample(tmp_path, user):
    rows = [{"response": r, "ground_truth": None} for r in ("x", "!", "y")]
    out = run(tmp_path, f"{user}:fails", rows)
    assert [row["reward"] for row in out] == [2.0, 0.0, 2.0]
    assert out[1]["components"] == {"a": 0.0, "b": 0.0}
    assert "reward_function_raised" in out[1]["reasons"]
    assert load_reward(f"{user}:leaves").score("", None).reasons[0] == "reward_function_raised"


@pytest.mark.parametrize(
    "result",
    [
        "None",
        "'1'",
        "float('nan')",
        "{}",
        "{'a': 1}",
        "{'reward': float('inf')}",
        "{'reward': 1, 'a': 'b'}",
        "{'reward': 1, 'a': 1, 'components': {'a': 2}}",
        "{'reward': 1, 'reasons': 'x'}",
        "[1]",
        "1j",
    ],
)
def test_an_invalid_result_costs_the_sample(user, result):
    score = load_reward(f"{user}:bad").score(result, None)
    assert (score.reward, score.reasons) == (0.0, ["reward_function_bad_result"])


def test_invalid_user_functions_raise(tmp_path, user):
    (tmp_path / "broken.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    for spec, message in [
        (f"{user}:missing", "no such function"),
        (f"{user}:lonely", "callable as f"),
        (f"{tmp_path}/none.py:f", "cannot be read"),
        (f"{tmp_path}/broken.py:f", "broken.py:2: does not run: SyntaxError"),
        (f"{tmp_path}/raises.py:f", "does not run: ZeroDivisionError"),
    ]:
        with pytest.raises(InputError, match=message):
            load_reward(spec)
    with pytest.raises(InputError, match="override"):
        load_reward(f"{user}:number", overrides={"a": 1})


def test_the_hash_depends_on_the_file_and_the_function(user, tmp_path):
    before = load_reward(f"{user}:number").hash
    assert before == load_reward(f"{user}:number").hash != load_reward(f"{user}:parts").hash
    (tmp_path / "mine.py").write_text(USER + "\n# changed")
    assert load_reward(f"{user}:number").hash != before


NAMES = ("self", "reward", "components", "reasons", "response_length", "kwargs", "row", "sample")


@pytest.mark.parametrize("command", [[], ["explain"]])
@pytest.mark.parametrize("spec", ["aks", "joint", "user"])
def test_keys_of_a_line_never_clash_with_arguments(tmp_path, command, spec, invoke):
    """Rollouts have a `reward`; a line may have any key."""
    path = tmp_path / "mine.py"
    path.write_text("def f(response, ground_truth, **row):\n    return 1.0\n")
    line = {"response": "<think>t</think><answer>A</answer>", "ground_truth": "A"}
    line |= {"data_source": "rcot/aks"} | dict.fromkeys(NAMES, 5)
    text = json.dumps(line)
    named = f"{path}:f" if spec == "user" else spec
    done = invoke("score", *command, named, stdin=text + "\n")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("response", [5, None, ["a"], {"x": 1}])
def test_a_response_that_is_not_text_can_be_explained(response, invoke):
    text = json.dumps({"response": response, "ground_truth": "A"})
    done = invoke("score", "explain", "aks", stdin=text + "\n")
    assert done.exit_code == 0 and "reward 0" in done.output

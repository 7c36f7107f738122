"""`rcot app`: limits, queue, files and refusals, with scripted responses and optical flow.

`test_app_slow.py` runs the page in a browser, with the shipped models.
"""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
import time
import zipfile
from fractions import Fraction

import cv2
import numpy as np
import pytest

from rcot_rl.errors import InputError
from rcot_rl.inference import segment
from rcot_rl.inference.app import _Refused, asked, display_name, serve, web_app
from rcot_rl.inference.app_jobs import AppLimits, JobQueue, step_view
from rcot_rl.inference.policy import PolicyResponse
from rcot_rl.inference.query_trace import TraceStep
from rcot_rl.inference.segment import SegmentModels
from rcot_rl.inference.video import write_video
from rcot_rl.recipe.inference_section import PredictSection

LIMITS = AppLimits(
    upload_bytes=1 << 20, frames=5, shown_frames=4, query_chars=20, rounds=3, waiting=2, kept=2
)
ANSWER = {
    "vdg": "a <b>red</b> square",
    "kfg": "<answer>1</answer>",
    "aks": "<think>it is <i>there</i></think><answer>A</answer>",
    "ktg": '<think>x</think><answer>[{"bbox_2d":[14,14,84,84],"point_2d":[49,49]}]</answer>',
}


class ScriptedPolicy:
    """Answers each task with its text; `gate` holds all answers back."""

    gate = threading.Event()

    def __init__(self, folder, section, *, device):
        pass

    def close(self):
        pass

    def count_tokens(self, text):
        return len(text)

    def most_frames(self, side, text_tokens):
        return 3

    async def generate(self, request, sampling, started=None):
        await asyncio.to_thread(self.gate.wait, 20)
        if request.video is not None:
            task = "vdg" if sampling.max_tokens == PredictSection().vdg_tokens else "kfg"
            return [PolicyResponse(ANSWER[task])]
        if not sampling.options:
            return [PolicyResponse(ANSWER["ktg"])]
        shares = {"A": 0.75, "B": 0.25}
        return [PolicyResponse(ANSWER["aks"], option_probabilities=shares)]


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.setattr(segment, "PolicyEngine", ScriptedPolicy)
    monkeypatch.setattr(ScriptedPolicy, "gate", threading.Event())
    ScriptedPolicy.gate.set()
    root = tmp_path / "root"
    root.mkdir()
    queue = JobQueue(root, SegmentModels("tiny", "flow"), LIMITS)
    yield queue
    ScriptedPolicy.gate.set()
    queue.close()


@pytest.fixture
def client(queue):
    from starlette.testclient import TestClient

    return TestClient(web_app(queue), base_url="http://127.0.0.1:7860")


@pytest.fixture
def video(tmp_path) -> bytes:
    images = np.full((4, 48, 64, 3), 60, np.uint8)
    for t in range(4):
        images[t, 10:34, 10 + 4 * t : 34 + 4 * t] = (220, 60, 30)
    write_video(tmp_path / "v.mp4", images, Fraction(5))
    return (tmp_path / "v.mp4").read_bytes()


def ended(client, id: str) -> dict:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        state = client.get(f"/api/jobs/{id}").json()
        if state["state"] not in ("uploading", "waiting", "running"):
            return state
        time.sleep(0.05)
    raise AssertionError(state)


def post(client, body: bytes = b"", **parameters):
    return client.post("/api/jobs", params={"query": "the square", **parameters}, content=body)


def test_a_query_about_an_upload_gives_pictures_verdicts_and_an_archive(client, video, queue):
    id = post(client, video, name="../../my clip.mp4", rounds="2").json()["id"]
    state = ended(client, id)
    assert state["state"] == "done" and state["name"] == "../../my clip.mp4"
    assert [step["task"] for step in state["steps"]] == ["vdg", "kfg", "aks", "ktg"]
    assert state["steps"][2] | {"response": ""} == {
        "task": "aks",
        "title": "Judgement",
        "frame": 2,  # the second of the three shown frames 0, 2 and 3
        "verdict": "A",
        "probability": 0.75,
        "thought": "it is <i>there</i>",
        "answer": "A",
        "response": "",
    }
    result = state["result"]
    assert (result["keyframe"], result["rounds"], result["objects"]) == (2, 1, 1)
    assert (result["shown"], len(result["shares"])) == (3, 4)
    assert state["message"] == result["summary"]
    assert result["summary"].startswith("the square: 1 object, keyframe 2 of 4 frames")
    assert not list(queue.root.rglob("my clip*")), "an uploaded name never becomes a path"
    with zipfile.ZipFile(io.BytesIO(client.get(f"/api/jobs/{id}/result.zip").content)) as archive:
        names = [f"masks/{t:05d}.png" for t in range(4)]
        assert archive.namelist() == [*names, "overlay.mp4", "strip.png", "trace.json"]
        trace = json.loads(archive.read("trace.json"))
        masks = [picture(archive.read(name), cv2.IMREAD_UNCHANGED) for name in names]
    assert trace["video"] == "../../my clip.mp4" and trace["query"] == "the square"
    for t, mask in enumerate(masks):
        assert result["shares"][t] == pytest.approx((mask > 0).mean(), abs=1e-5)
        frame = picture(client.get(f"/api/jobs/{id}/frames/{t}").content)
        overlay = picture(client.get(f"/api/jobs/{id}/overlay/{t}").content)
        overlay = cv2.resize(overlay, frame.shape[1::-1], interpolation=cv2.INTER_AREA)
        difference = np.abs(frame.astype(int) - overlay).sum(axis=-1)
        assert difference[mask > 0].mean() > 3 * difference[14:30, 56:].mean()
        served = picture(client.get(f"/api/jobs/{id}/masks/{t}").content, cv2.IMREAD_UNCHANGED)
        assert np.array_equal(served, mask)
    for path in ("frames/4", "nothing/0", "..%2F..%2Fdemo.mp4/0"):
        assert client.get(f"/api/jobs/{id}/{path}").status_code == 404


def picture(data: bytes, flags: int = cv2.IMREAD_COLOR) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"no video at all", "my.mp4: cannot be decoded"),
        (None, "my.mp4: more than 5 frames of 32 x 32; cut the video"),
    ],
)
def test_a_bad_video_is_one_line_without_the_servers_path(client, queue, tmp_path, body, message):
    if body is None:
        write_video(tmp_path / "long.mp4", np.zeros((6, 32, 32, 3), np.uint8), Fraction(5))
        body = (tmp_path / "long.mp4").read_bytes()
    id = post(client, body, name="my.mp4").json()["id"]
    state = ended(client, id)
    assert state["state"] == "failed" and state["message"].startswith(message)
    assert str(queue.root) not in state["message"] and "\n" not in state["message"]
    assert not (queue.root / id).exists()


@pytest.mark.parametrize(
    ("parameters", "body", "status", "message"),
    [
        ({"query": " "}, b"x", 400, "the query is empty"),
        ({"query": "x" * 21}, b"x", 400, "more than 20 characters"),
        ({"rounds": "4"}, b"x", 400, "at most 3 rounds"),
        ({"rounds": "-1"}, b"x", 400, "rounds must be a number"),
        ({"rounds": "²"}, b"x", 400, "rounds must be a number"),
        ({}, b"", 400, "choose a video"),
        ({}, b"x" * ((1 << 20) + 1), 413, "more than 1 MiB"),
    ],
)
def test_requests_beyond_a_limit_are_refused(client, queue, parameters, body, status, message):
    reply = post(client, body, **parameters)
    assert reply.status_code == status and message in reply.json()["error"]
    assert not [path for path in queue.root.iterdir() if path.is_dir()], "nothing is left"


def test_other_sites_and_other_host_names_are_refused(client):
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"host": "evil.example:7860"}).status_code == 400
    for origin in ("http://evil.example", "http://127.0.0.1:1", "null"):
        reply = client.post("/api/jobs?demo=1&query=x", headers={"origin": origin})
        assert reply.status_code == 403
    own = {"origin": "http://127.0.0.1:7860"}
    assert client.post("/api/jobs?demo=1&query=x", headers=own).status_code == 201
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_one_query_runs_others_wait_and_a_cancelled_one_makes_room(client, video):
    ScriptedPolicy.gate.clear()
    first, second = (post(client, video).json()["id"] for _ in range(2))
    assert post(client, video).status_code == 429
    waiting = client.get(f"/api/jobs/{second}").json()
    assert (waiting["state"], waiting["ahead"]) == ("waiting", 1)
    assert client.post(f"/api/jobs/{first}/cancel").status_code == 204
    ScriptedPolicy.gate.set()
    assert ended(client, first)["state"] == "cancelled"
    assert ended(client, second)["state"] == "done", "the models can be used again"


def test_the_oldest_results_are_removed_and_failures_remove_none(client, video, queue):
    ids = [post(client, video).json()["id"]]
    ended(client, ids[0])
    for _ in range(4):
        assert post(client, b"").status_code == 400
    assert client.get(f"/api/jobs/{ids[0]}/result.zip").status_code == 200
    for _ in range(2):
        ids.append(post(client, video).json()["id"])
        ended(client, ids[-1])
    assert client.get(f"/api/jobs/{ids[0]}").status_code == 404
    assert {path.name for path in queue.root.iterdir() if path.is_dir()} == set(ids[1:])


def test_light_re_evaluation_rounds_and_shown_frames_are_settings_of_the_pipeline():
    _, section = asked({"query": "x", "rounds": "2", "light": "1"}, LIMITS)
    assert (section.rounds, section.reevaluate_frames, section.max_frames) == (2, 16, 4)
    _, section = asked({"query": "x", "light": "0"}, AppLimits())
    assert (section.rounds, section.reevaluate_frames, section.max_frames) == (5, None, None)
    with pytest.raises(_Refused):
        asked({"query": "\udce9"}, LIMITS)


def test_a_verdict_has_the_probability_of_its_option_if_the_trace_has_it():
    response = "<think>t</think><answer>B</answer>"
    assert step_view(TraceStep("aks", 3, response))["probability"] is None
    shares = {"A": 0.25, "B": 0.75}
    view = step_view(TraceStep("aks", 3, response, option_probabilities=shares))
    assert (view["verdict"], view["probability"]) == ("B", 0.75)
    view = step_view(TraceStep("aks", 3, "B", option_probabilities=shares))
    assert (view["verdict"], view["probability"], view["thought"]) == (None, None, None)


@pytest.mark.parametrize(
    ("name", "shown"), [("a\nb.mp4", "a\ufffdb.mp4"), ("", "video"), ("x" * 500, "x" * 120)]
)
def test_names_are_shown_printable_and_short(name, shown):
    assert display_name(name) == shown


def test_a_taken_port_is_an_error_before_models_load(monkeypatch):
    monkeypatch.setattr(segment, "PolicyEngine", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on port {port}") as caught:
            serve(SegmentModels("tiny", "flow"), port, LIMITS, print)
    assert caught.value.key == "--port"

"""A forked process behaves like a new interpreter: same argv, environment, descriptors."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.supervise.zygote import write_client
from rcot_rl.training.jobs import PRELOAD


@contextmanager
def serving(folder: Path, *modules: str, **environment: str):
    folder.chmod(0o700)
    client = write_client(folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.supervise.zygote", str(folder / "socket"), *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"RCOT_ZYGOTE_PYTHON": str(client)} | environment,
    )
    while (line := process.stdout.readline()) != b"ready\n":
        assert line, "the zygote ended before it was ready"
    yield client, process
    process.stdin.close()
    assert process.wait(timeout=20) == 0


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("z"), "decimal") as running:
        yield running


def run(client: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(client), *arguments], capture_output=True, text=True, timeout=60, **options
    )


def test_a_script_sees_its_own_arguments_environment_folder_and_status(zygote, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "print(sys.argv[1:], os.environ['MARK'], os.getcwd(), 'decimal' in sys.modules)\n"
        "print(__name__, os.getppid(), file=sys.stderr)\n"
        "sys.exit(7)\n"
    )
    client, process = zygote
    done = run(client, "-u", str(script), "a", "b c", env=os.environ | {"MARK": "x"}, cwd=tmp_path)
    assert done.returncode == 7
    assert done.stdout.strip() == f"['a', 'b c'] x {tmp_path} True"
    assert done.stderr.split() == ["__main__", str(process.pid)], "it was forked by the zygote"


def test_a_forked_module_reads_standard_input(zygote):
    done = run(zygote[0], "-m", "json.tool", "--compact", input='{"a": [1, 2]}')
    assert (done.returncode, done.stdout.strip()) == (0, '{"a":[1,2]}')


def test_multiprocessing_spawn_goes_through_the_zygote_too(zygote, tmp_path):
    script = tmp_path / "spawns.py"
    script.write_text(
        "import multiprocessing, os, sys\n"
        "def work(queue):\n"
        "    queue.put((os.getpid(), os.getppid(), 'decimal' in sys.modules))\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    queue = context.Queue()\n"
        "    child = context.Process(target=work, args=(queue,)); child.start()\n"
        "    print(*queue.get(timeout=30)); child.join(); sys.exit(child.exitcode)\n"
    )
    done = run(zygote[0], str(script), env=os.environ | {"RCOT_ZYGOTE_PYTHON": str(zygote[0])})
    assert done.returncode == 0, done.stderr
    _, parent, preloaded = done.stdout.split()
    assert (int(parent), preloaded) == (zygote[1].pid, "True")


def test_other_code_runs_in_the_real_interpreter(zygote):
    done = run(zygote[0], "-c", "import os, sys; print(os.getppid(), 'decimal' in sys.modules)")
    assert done.returncode == 0
    assert done.stdout.split()[1] == "False"


def test_an_exception_is_printed_and_is_status_1(zygote, tmp_path):
    script = tmp_path / "raises.py"
    script.write_text("raise RuntimeError('so it ends')\n")
    done = run(zygote[0], str(script))
    assert done.returncode == 1
    assert "RuntimeError: so it ends" in done.stderr


def test_the_child_ends_with_its_client(zygote, tmp_path):
    script = tmp_path / "sleeps.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(300)\n")
    process = subprocess.Popen([str(zygote[0]), str(script)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            return
        subprocess.run(["sleep", "0.05"], check=True)
    pytest.fail("the forked process outlived its client")


IDS = (
    "import threading\n"
    "from ray import NodeID\n"
    "ids = [NodeID.from_random().hex()]\n"
    "thread = threading.Thread(target=lambda: ids.append(NodeID.from_random().hex()))\n"
    "thread.start(); thread.join(); print(*ids)\n"
)


def drawn_ids(client: Path, script: Path) -> list[str]:
    script.write_text(IDS)
    done = [run(client, str(script)) for _ in range(3)]
    assert all(d.returncode == 0 for d in done), done[0].stderr
    return [name for d in done for name in d.stdout.split()]


def test_forked_processes_draw_different_ids(tmp_path):
    """Ray names tasks by these ids. If an engine gets two tasks with one id, Ray ends it."""
    (tmp_path / "an_actor.py").write_text("import ray\n\n@ray.remote\nclass Actor: pass\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    (tmp_path / "z").mkdir()
    with serving(tmp_path / "z", "ray", "an_actor", PYTHONPATH=path) as (client, _):
        ids = drawn_ids(client, tmp_path / "draws.py")
    assert len(set(ids)) == len(ids) == 6


@pytest.mark.slow
def test_processes_forked_with_all_modules_of_a_run_draw_different_ids(tmp_path):
    (tmp_path / "z").mkdir()
    environment = {"RCOT_RL_PLUGIN": "required", "VERL_PLATFORM": "cpu"}
    with serving(tmp_path / "z", *PRELOAD, **environment) as (client, _):
        ids = drawn_ids(client, tmp_path / "draws.py")
    assert len(set(ids)) == len(ids) == 6


def test_without_a_zygote_the_client_is_an_ordinary_python(tmp_path):
    client = write_client(tmp_path)
    assert run(client, "-c", "print(1 + 1)").stdout.strip() == "2"

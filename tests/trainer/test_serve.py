"""`rlvr-ops serve` without vLLM: what it starts, and that it leaves nothing behind. With it: integrations/vllm."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from rlvr_trainer import cli
from rlvr_trainer.sampling import processes, serve
from rlvr_trainer.sampling.shared_memory import SHARED_MEMORY

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="this system has no /proc")

FAMILY = """
import mmap, multiprocessing, signal, time
from multiprocessing.shared_memory import SharedMemory
def work():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
if __name__ == "__main__":
    with open("{file}", "w+b") as file:
        file.truncate(64)
        mapped = mmap.mmap(file.fileno(), 64)  # nobody's but ours: no tracker knows of it
    memory = SharedMemory(create=True, size=64)
    multiprocessing.get_context("fork").Process(target=work).start()
    {stubborn}
    print(memory.name, flush=True)
    time.sleep(600)
"""
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 2.0)


@pytest.fixture
def family():
    """Start a process with two children; give it and its shared memory, which Python knows of in part."""
    started = []

    def start(stubborn=""):
        file = SHARED_MEMORY / f"test-{os.getpid()}-{len(started)}"
        code = FAMILY.replace("{stubborn}", stubborn).replace("{file}", str(file))
        first = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(first)
        shared = [SHARED_MEMORY / first.stdout.readline().strip(), file]
        assert all(path.exists() for path in shared)
        assert len(processes.members(first.pid)) == 3  # with Python's resource tracker
        return first, shared

    yield start
    for first in started:
        first.wait(20)


def is_gone(first, shared):
    return not processes.members(first.pid) and not any(path.exists() for path in shared)


@pytest.mark.parametrize("stubborn", ["", STUBBORN])
def test_all_processes_of_a_session_and_their_shared_memory_end(family, stubborn):
    first, shared = family(stubborn)
    processes.end(first.pid)
    assert is_gone(first, shared)


def test_what_a_killed_first_process_leaves_ends_too(family):
    first, shared = family()
    first.kill()
    first.wait(5)
    assert processes.members(first.pid)
    processes.end(first.pid)
    assert is_gone(first, shared)


def test_shared_memory_goes_though_nobody_lives_who_used_it(family, tmp_path):
    first, shared = family()
    with processes.ended_with_us(first.pid, str(tmp_path)):
        time.sleep(2.5)
        for pid in processes.members(first.pid):
            os.kill(pid, signal.SIGKILL)
        assert shared[1].exists()
    assert not shared[1].exists()
    shared[0].unlink(missing_ok=True)


def test_a_session_and_its_folder_end_with_its_killed_parent(family, tmp_path):
    first, shared = family()
    code = f"""
import time
from rlvr_trainer.sampling.processes import ended_with_us
with ended_with_us({first.pid}, {str(tmp_path)!r}):
    print("up", flush=True)
    time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    parent.stdout.readline()
    parent.kill()
    parent.wait()
    first.wait(20)
    deadline = time.monotonic() + 20
    while not is_gone(first, shared) or tmp_path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def started(monkeypatch):
    """Commands and environments that would be run."""
    found = []
    monkeypatch.setattr(serve, "find_spec", lambda name: name)
    monkeypatch.setattr(serve, "_watch", lambda command, environment, folder: found.append((command, environment)) or 0)
    return found


def test_the_server_starts_with_what_training_needs_and_with_what_one_adds(started, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    assert cli.main(["serve", "some/model", "--port", "8123", "--", "--max-model-len", "256", "--seed=7"]) == 0
    [(command, environment)] = started
    text = " ".join(command)
    assert "--logprobs-mode processed_logprobs" in text
    assert "--worker-extension-cls rlvr_trainer.sampling.worker.Extension" in text
    assert "--model some/model --host 127.0.0.1 --port 8123" in text
    assert text.endswith("--max-model-len 256 --seed=7")
    assert torch.cuda.is_available() or "--no-enable-chunked-prefill" in text
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"


def test_a_run_is_served_by_its_newest_model(started, finished, tmp_path, capsys):
    assert cli.main(["serve", str(finished)]) == 0
    assert str(finished / "model") in started[0][0]
    assert "--dtype float32" in " ".join(started[0][0])  # as it is stored
    assert cli.main(["serve", str(finished), "--dtype", "bfloat16"]) == 0
    assert "--dtype bfloat16" in " ".join(started[1][0])
    (tmp_path / "config.yaml").touch()
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "holds no model yet" in capsys.readouterr().err


def test_the_main_process_ends_with_the_signals_code_or_says_that_the_server_ended(capsys, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: name)
    monkeypatch.setattr(serve, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    assert cli.main(["serve", "some/model"]) == 1
    assert capsys.readouterr().err.startswith("rlvr-ops: the server ended (with exit code 3)")
    code = f"import os, time; os.kill({os.getpid()}, {signal.SIGTERM}); time.sleep(60)"
    monkeypatch.setattr(serve, "COMMAND", (sys.executable, "-c", code))
    assert cli.main(["serve", "some/model"]) == 128 + signal.SIGTERM


def test_a_signal_that_was_ignored_stays_so(capsys, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: name)
    code = f"import os, time; os.kill({os.getpid()}, {signal.SIGHUP}); time.sleep(0.5); raise SystemExit(3)"
    monkeypatch.setattr(serve, "COMMAND", (sys.executable, "-c", code))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.main(["serve", "some/model"]) == 1
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "with exit code 3" in capsys.readouterr().err


def test_an_option_of_vllms_belongs_behind_two_dashes(started, capsys):
    assert cli.main(["serve", "some/model", "--max-model-len", "4096"]) == 2
    assert "go behind --: rlvr-ops serve some/model -- --max-model-len 4096" in capsys.readouterr().err
    assert not started


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_what_to_install(capsys):
    assert cli.main(["serve", "some/model"]) == 1
    assert capsys.readouterr().err == 'rlvr-ops: rlvr-ops serve needs vLLM: pip install "rlvr-ops[train,vllm]"\n'

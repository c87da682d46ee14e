"""Ctrl-C, SIGTERM, SIGHUP and kill -9, wherever they come: the run goes on to the numbers of an undisturbed one."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rlvr_trainer import checkpoints, loop, stopping
from rlvr_trainer.cli import main
from rlvr_trainer.config import load
from rlvr_trainer.console import read_jsonl
from rlvr_trainer.stopping import Stop, Stopped, StoppedAtOnce, asked_to_stop
from transformers import LlamaForCausalLM

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def settings_like(finished, run, *overrides):
    return load(finished / "config.yaml", [f"run.out={run}", *overrides])


def assert_same(run, finished):
    """Weights, evaluations, completions and metrics, clocks aside."""
    assert (run / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()
    for name in ("metrics", "completions", "evaluations"):
        rows = [read_jsonl(folder / f"{name}.jsonl") for folder in (run, finished)]
        found, wanted = ([{k: v for k, v in row.items() if not k.startswith("perf/")} for row in part] for part in rows)
        assert found == wanted, name


@pytest.fixture(autouse=True)
def hangups_are_heard():
    """Under nohup SIGHUP is ignored, by a run as well."""
    own = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, own)


@pytest.fixture
def signal_at(monkeypatch):
    """Gives a function that has a signal come in the n-th forward pass from then on."""
    own, count, planned = LlamaForCausalLM.forward, [0], [0, signal.SIGINT]

    def forward(self, *arguments, **keywords):
        count[0] += 1
        if count[0] == planned[0]:
            signal.raise_signal(planned[1])
        return own(self, *arguments, **keywords)

    def plan(n, number):
        count[0], planned[:] = 0, [n, number]

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    return plan


WHERE = {  # the function, which of its calls, and which forward pass in that
    "first evaluation": ("evaluate", 1, 1),
    "scores of the first evaluation": ("evaluate", 1, 6),
    "first sampling": ("collect", 1, 1),
    "sampling": ("collect", 2, 4),
    "update": ("update", 2, 2),
    "last evaluation": ("evaluate", 2, 3),
}


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("warm start", signal.SIGINT),
        ("first evaluation", signal.SIGTERM),
        ("scores of the first evaluation", signal.SIGINT),
        ("first sampling", signal.SIGHUP),
        ("sampling", signal.SIGTERM),
        ("update", signal.SIGINT),
        ("last evaluation", signal.SIGHUP),
    ],
)
def test_a_signal_anywhere_loses_nothing(place, number, every, finished, tmp_path, signal_at, monkeypatch, capsys):
    plan = signal_at
    run = tmp_path / "run"
    config = settings_like(finished, run, f"run.checkpoint_every={every}")
    if place == "warm start":
        plan(2, number)
    else:
        name, call, forwards = WHERE[place]
        own, calls = getattr(loop, name), []

        def watched(*arguments):
            calls.append(1)
            if len(calls) == call:
                plan(forwards, number)
            return own(*arguments)

        monkeypatch.setattr(loop, name, watched)
    handlers = [signal.getsignal(one) for one in CODES]
    if place == "warm start":
        with pytest.raises(
            Stopped, match="stopped before training began, nothing was lost: the same command"
        ) as stopped:
            loop.train(config)
        assert stopped.value.exit_code == CODES[number]
    else:
        found = loop.train(config)
        step = {"sampling": 1, "update": 2, "last evaluation": 4}.get(place, 0)
        assert (found["interrupted_at"], found["signal"]) == (step, number)
        assert found["checkpoint"] == str(checkpoints.folder_of(run, step))
        said = capsys.readouterr().out
        assert f"interrupted: saved {found['checkpoint']}; continue with: rlvr-ops train --resume {run}" in said
    assert [signal.getsignal(one) for one in CODES] == handlers
    monkeypatch.undo()
    loop.train(config, resume=place != "warm start", quiet=True)
    assert_same(run, finished)


def test_a_signal_in_an_update_waits_for_its_end(finished, tmp_path, monkeypatch, capfd):
    own, done = loop.update, []

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        values = own(*arguments)
        done.append(1)
        return values

    monkeypatch.setattr(loop, "update", interrupted)
    assert loop.train(settings_like(finished, tmp_path / "run"), quiet=True)["interrupted_at"] == 1
    assert done == [1]
    assert "stopping as soon as nothing is lost by it (once more: at once" in capfd.readouterr().err


@pytest.mark.parametrize("number", CODES)
def test_the_exit_code_says_which_signal_it_was(number, finished, tmp_path, monkeypatch, capsys):
    own = loop.collect
    monkeypatch.setattr(loop, "collect", lambda *arguments: signal.raise_signal(number) or own(*arguments))
    out = str(tmp_path / "run")
    assert main(["train", str(finished / "config.yaml"), "--out", out]) == CODES[number]
    assert f"interrupted: saved {out}/checkpoints/step-000000" in capsys.readouterr().out
    monkeypatch.setattr(loop, "load_policy", lambda *_: signal.raise_signal(number))
    assert main(["train", "--resume", out]) == CODES[number]
    assert "stopped before training began" in capsys.readouterr().err


def test_a_second_signal_stops_at_once_unless_it_is_the_first_one_again(monkeypatch):
    with asked_to_stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)  # a closing terminal sends both
        assert stop.number == signal.SIGTERM
        monkeypatch.setattr(stopping, "SAME_REQUEST", -1.0)
        with pytest.raises(StoppedAtOnce, match="SIGINT: stopped at once, nothing more was saved"):
            signal.raise_signal(signal.SIGINT)


def test_a_second_signal_in_an_update_saves_nothing_half_done(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "SAME_REQUEST", -1.0)
    monkeypatch.setattr(loop, "update", lambda *_: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    run = tmp_path / "run"
    with pytest.raises(StoppedAtOnce):
        loop.train(settings_like(finished, run), quiet=True)
    assert [path.name for path in checkpoints.list_checkpoints(run)] == ["step-000000"]


def test_what_is_ignored_stays_ignored_as_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with asked_to_stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.number is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_except_clause_of_a_verifier_swallows_a_signal():
    stop = Stop()

    class Destroyed:
        def __del__(self):
            stop.handle(signal.SIGTERM, None)  # Python prints and drops what is raised here

    with pytest.raises(Stopped), stop.at_once():  # noqa: PT012
        thing = Destroyed()
        try:
            del thing
        except Exception:
            pytest.fail("an Exception")
    with pytest.raises(Stopped), stop.at_once():
        pytest.fail("began although somebody had asked to stop")


def test_a_run_in_another_thread_watches_no_signals(finished, tmp_path):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(loop.train(settings_like(finished, tmp_path / "run", "run.steps=1"), quiet=True))
    )
    thread.start()
    thread.join()
    assert found[0]["steps"] == 1


def test_sampling_stops_within_a_second_or_so(finished, tmp_path):
    """In a process of its own, with completions that take minutes."""
    slow = [
        "rollout.max_new_tokens=900",
        "rollout.prompts=64",
        "evaluation.samples=1",
        "task.held_out=1",
        "run.steps=9",
    ]
    command = [sys.executable, "-m", "rlvr_trainer", "train", str(finished / "config.yaml"), *slow]
    process = subprocess.Popen([*command, f"run.out={tmp_path / 'run'}"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("held out at step 0"):
        assert process.poll() is None
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert time.monotonic() - began < 5
    assert "interrupted: saved" in said


@pytest.mark.slow
def test_kill_9_at_twenty_random_points_and_a_resume_give_the_numbers_of_an_undisturbed_run(finished, tmp_path):
    script = str(Path(__file__).with_name("killed_runs.py"))
    command = [sys.executable, script, str(finished / "config.yaml"), str(tmp_path), "20", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    steps = [int(line) for line in done.stdout.split()]
    assert len(steps) == 20
    assert len(set(steps)) > 2  # in different places
    for i in range(21):
        assert_same(tmp_path / f"run-{i}", finished)

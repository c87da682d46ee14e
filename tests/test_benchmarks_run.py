"""The commands: pytest --benchmark, and the one for a machine with a GPU, on toy shapes."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_launches, gpu_suite, gpu_tuning, on_gpu, recorder
from benchmarks.cases import Case
from benchmarks.gpu_stage import Stage
from benchmarks.provenance import ROOT
from benchmarks.recorder import Recorder
from benchmarks.replay import REPLAY
from benchmarks.report import SCRATCH, device_folder
from benchmarks.run import DeviceLostError
from benchmarks.systems import ENTRIES, entries

CPU = torch.device("cpu")
CASE, LOSS = Case("logps", 16, 8, 50, 4), Case("ace", 16, 8, 50, 4)
WHOLE = [(CASE, entry.key) for entry in entries(CASE)]


def test_some_systems_of_some_cases_are_measured_with_what_their_ratios_need_and_stored_as_both_json(tmp_path):
    kept = tmp_path / "kept.json"
    asked = (
        "--benchmark",
        "--benchmark-quick",
        "-k",
        "logps and (rlvr_ops or cce)",
        "--benchmark-columns=median,rounds",
    )
    written = (f"--benchmark-json={kept}", f"--benchmark-results={tmp_path}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *asked, *written]
    # A worker of pytest-xdist says so in its environment, and its own runs would take themselves for one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rlvr_ops, workspace_bytes=0: needs a CUDA GPU" in done.stdout or torch.cuda.is_available()
    (stored,) = tmp_path.glob("*/*.json")
    result = json.loads(stored.read_text())
    rows = {row["key"]: row for row in result["systems"]}
    assert {"rlvr_ops", "products", "eager-cross_entropy", "eager-logsumexp"} <= rows.keys()
    assert {"device", "clocks", "versions", "commit", "command", "load_average"} <= result.keys()
    measured = {one["params"]["system"]: one for one in json.loads(kept.read_text())["benchmarks"]}
    assert measured["rlvr_ops"]["stats"]["median"] == pytest.approx(1e-3 * rows["rlvr_ops"]["median_ms"])
    assert measured["rlvr_ops"]["stats"]["rounds"] == rows["rlvr_ops"]["runs"] >= 3
    assert measured["rlvr_ops"]["extra_info"]["errors"] == rows["rlvr_ops"]["errors"]


@pytest.mark.parametrize("flag", ["--benchmark-quick", "--benchmark-results"])
def test_the_flags_of_the_benchmark_go_with_it(flag):
    specification = importlib.util.spec_from_file_location("root_conftest", ROOT / "conftest.py")
    conftest = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(conftest)
    with pytest.raises(pytest.UsageError, match="go with --benchmark"):
        conftest.pytest_configure(SimpleNamespace(getoption=lambda name: name == flag))


def test_measured_times_are_replayed_as_the_rounds_of_the_benchmark():
    class Benchmark:
        extra_info: dict = {}  # noqa: RUF012
        seen: list = []  # noqa: RUF012

        def pedantic(self, target, rounds):
            for _ in range(rounds):
                start = REPLAY()
                target()
                self.seen.append(REPLAY() - start)

    benchmark = Benchmark()
    REPLAY.into(benchmark, [0.1, 0.3, 0.2], {"kind": "ours"})
    assert benchmark.seen == [0.1, 0.3, 0.2]
    assert benchmark.extra_info == {"kind": "ours"}


@pytest.fixture
def one_turn(monkeypatch):
    monkeypatch.setattr(recorder, "rounds", lambda *_, **__: {"seconds": 0, "least": 1, "most": 1})


@pytest.mark.parametrize(("chosen", "quick"), [(WHOLE, True), ([(CASE, "rlvr_ops")], False)])
def test_quick_and_partial_runs_never_overwrite_the_stored_results(chosen, quick):
    assert SCRATCH in Recorder(chosen, CPU, "c", quick=quick, place=None)._folder(CASE).parents
    whole = Recorder(WHOLE, CPU, "c", quick=False, place=None)._folder(CASE)
    assert whole == ROOT / "benchmarks" / "results" / device_folder(CPU)


def test_a_case_is_measured_once_for_all_its_tests_and_fails_for_all(tmp_path, monkeypatch, one_turn):
    once = Recorder([(CASE, "rlvr_ops")], CPU, "c", quick=True, place=tmp_path)
    assert once.of(CASE) is once.of(CASE)
    assert len(once.results) == 1

    def off(*_, **__):
        raise AssertionError("further off than eager")

    failing = Recorder([(CASE, "rlvr_ops")], CPU, "c", quick=True, place=tmp_path)
    monkeypatch.setattr(recorder, "measure", off)
    for _ in range(2):
        with pytest.raises(AssertionError, match="further off than eager"):
            failing.of(CASE)


def test_every_stage_of_the_command_for_a_gpu_writes_what_it_finds(tmp_path, monkeypatch, capsys):
    given = ["stage", "--tiny", "--device", "cpu", "--seconds", "60", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    for stage in (gpu_suite, gpu_launches, gpu_tuning):
        assert not stage.main(), stage.__name__
    assert {path.stem for path in (tmp_path / device_folder(CPU)).glob("*.json")} == {
        "ace-16x8x50-float32-100-active",
        "grpo-16x8x50-float32-50-active",
        "logps-16x8x50-float32-100-active",
    }
    rows = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("launches", "tuning")}
    assert [row["what"] for row in rows["launches"]] == ["whole call, ace-16x8x50-float32-100-active"]
    tuned = {row["what"] for row in rows["tuning"]}
    assert {"single_pass", "two_pass", "fused_policy", "lse_fold", "dlogits", "weigh", "linear_lse as chosen"} <= tuned
    assert {"fused_policy, one launch", "fused_policy, three launches", "a third clipped"} <= tuned
    assert not [row for row in rows["tuning"] if isinstance(row["ms"], str)]
    assert "x_products" in on_gpu.table(tmp_path)


def test_a_stage_runs_in_a_process_of_its_own_and_is_ended_when_its_time_is_up(tmp_path, capsys):
    tiny = ["--tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert on_gpu.main([*tiny, "--minutes", "10", "--only", "products", "scaling"]) == 0
    assert "products: exit 0" in capsys.readouterr().out
    forms = {row["form"] for row in json.loads((tmp_path / "products.json").read_text())}
    assert forms >= {"logits", "d_weight += fp32"}
    on_gpu.main([*tiny, "--minutes", "0.005", "--only", "suite"])
    assert "suite: out of time" in capsys.readouterr().out


@pytest.fixture
def tiny_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "commit", lambda: {"id": "abc", "dirty": False})
    monkeypatch.setattr("benchmarks.report.commit", gpu_suite.commit)
    return Stage(tmp_path, CPU, time.monotonic() + 60, tiny=True)


def broken(key):
    """The entries, of which one fails whenever it runs."""

    def load(case):
        def run(batch):
            raise RuntimeError("a kernel that has never run")

        return run

    return [replace(entry, load=load) if entry.key == key else entry for entry in ENTRIES]


def test_the_suite_goes_on_where_an_earlier_run_has_stopped(tiny_stage, monkeypatch):
    place, some = tiny_stage.out, gpu_suite.of_this(LOSS, gpu_suite.FEW)
    path = place / f"{LOSS.name}.json"
    assert not gpu_suite.is_there(path, some)
    assert gpu_suite.run(LOSS, some, tiny_stage, place)
    assert gpu_suite.is_there(path, some)
    assert not gpu_suite.is_there(path, gpu_suite.of_this(LOSS, None)), "most were not asked for"
    for other in ({"id": "another", "dirty": False}, {"id": "abc", "dirty": True}, {"id": None, "dirty": None}):
        monkeypatch.setattr(gpu_suite, "commit", lambda other=other: other)
        assert not gpu_suite.is_there(path, some)


def test_a_system_of_ours_that_fails_leaves_the_others_their_results_and_is_tried_again(
    tiny_stage, monkeypatch, capsys
):
    monkeypatch.setattr("benchmarks.systems.ENTRIES", broken("rlvr_ops-two_pass"))
    keys, path = {"rlvr_ops", "rlvr_ops-two_pass"}, tiny_stage.out / f"{LOSS.name}.json"
    assert not gpu_suite.run(LOSS, keys, tiny_stage, tiny_stage.out)
    assert "WRONG rlvr_ops, two_pass: RuntimeError: a kernel that has never run" in capsys.readouterr().out
    assert {row["key"] for row in json.loads(path.read_text())["systems"]} >= {
        "rlvr_ops",
        "products",
        "eager-logsumexp",
    }
    assert not gpu_suite.is_there(path, keys)
    assert gpu_suite.is_there(path, {"rlvr_ops"})


def test_numbers_of_ours_that_are_off_are_timed_and_said(tiny_stage, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.truth.FLOAT32_NOISE", 0.0)
    monkeypatch.setattr("benchmarks.truth.TIE", 0.0)
    assert not gpu_suite.run(LOSS, {"rlvr_ops"}, tiny_stage, tiny_stage.out)
    assert "WRONG rlvr_ops: loss is" in capsys.readouterr().out
    rows = {row["key"]: row for row in json.loads((tiny_stage.out / f"{LOSS.name}.json").read_text())["systems"]}
    assert rows["rlvr_ops"]["wrong"].startswith("rlvr_ops: loss is")
    stored = json.loads((tiny_stage.out / f"{LOSS.name}.json").read_text())
    assert not gpu_suite.is_sound(stored, "from an earlier run"), "nor is it when the run goes on"
    assert rows["rlvr_ops"]["median_ms"] > 0


class BegunAnew(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [
        ("trl", "--without cce-exact", "--without cce-exact trl --skip"),
        ("eager-logsumexp", "", "--failed --without --skip ace-16x8x50-float32-100-active"),
        ("trl", "--without trl", "--failed --without trl --skip ace-16x8x50-float32-100-active"),
    ],
    ids=["a peer", "one that every case needs", "again"],
)
def test_what_breaks_the_device_is_left_out_of_the_next_process(key, before, after, tiny_stage, monkeypatch):
    def lost(*_, **__):
        raise DeviceLostError(key, "an illegal memory access was encountered")

    def anew(program, command):
        begun.append(command)
        raise BegunAnew

    begun = []
    given = ["stage", "--tiny", "--device", "cpu", "--seconds", "60", "--out", str(tiny_stage.out), *before.split()]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(gpu_suite, "measure", lost)
    monkeypatch.setattr(gpu_suite.os, "execv", anew)
    with pytest.raises(BegunAnew):
        gpu_suite.main()
    assert begun[0][1:3] == ["-m", "benchmarks.gpu_suite"]
    assert begun[0][begun[0].index("--tiny") + 1 :] == after.split()


def test_a_system_that_was_left_out_has_its_reason(tiny_stage):
    without = tiny_stage._replace(without=("trl",))
    gpu_suite.run(LOSS, {"rlvr_ops", "trl"}, without, tiny_stage.out)
    stored = json.loads((tiny_stage.out / f"{LOSS.name}.json").read_text())
    assert [(one["key"], one["reason"]) for one in stored["absent"]] == [("trl", "has broken the device for all")]


def test_the_last_stage_may_take_all_that_is_left(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(on_gpu, "run", lambda stage, chosen, seconds: given.setdefault(stage, seconds) and 0)
    on_gpu.main(["--device", "cpu", "--minutes", "10", "--out", str(tmp_path), "--only", "tests", "suite"])
    assert given["tests"] == pytest.approx(180, abs=5)
    assert given["suite"] == pytest.approx(600, abs=5)


def test_what_is_interrupted_has_time_for_its_last_words_and_leaves_nobody_behind(tmp_path):
    pid = tmp_path / "pid"
    talks = f"""
import pathlib, subprocess, time
deaf = subprocess.Popen(["sh", "-c", "trap : INT; sleep 60; sleep 60"], stdout=subprocess.DEVNULL)
pathlib.Path({str(pid)!r}).write_text(str(deaf.pid))
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("failed so far: 3")
"""
    process = subprocess.Popen([sys.executable, "-c", talks], stdout=subprocess.PIPE, start_new_session=True)
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    assert on_gpu.ended(process, 0.5) == on_gpu.TIMED_OUT
    assert process.stdout.read() == b"failed so far: 3\n"
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"

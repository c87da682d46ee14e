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

from benchmarks import bench_losses, on_gpu
from benchmarks.bench_losses import REPLAY, Recorder
from benchmarks.cases import Case
from benchmarks.measure import DeviceLostError, wrong
from benchmarks.on_gpu import Stage
from benchmarks.peers import SYSTEMS, systems
from benchmarks.results import ROOT, SCRATCH, device_folder

CPU = torch.device("cpu")
CASE, LOSS = Case("logps", 16, 8, 50, 4), Case("ace", 16, 8, 50, 4)
WHOLE = [(CASE, system.key) for system in systems(CASE)]


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
    assert "cut-cross-entropy" in done.stdout or torch.cuda.is_available()
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
    monkeypatch.setattr(bench_losses, "rounds", lambda *_, **__: {"seconds": 0, "least": 1, "most": 1})


@pytest.mark.parametrize(("chosen", "quick"), [(WHOLE, True), ([(CASE, "rlvr_ops")], False)])
def test_quick_and_partial_runs_never_overwrite_the_stored_results(chosen, quick):
    assert SCRATCH in Recorder(chosen, CPU, "c", quick=quick, results=None).folder(CASE).parents
    whole = Recorder(WHOLE, CPU, "c", quick=False, results=None).folder(CASE)
    assert whole == ROOT / "benchmarks" / "results" / device_folder(CPU)


def test_a_case_is_measured_once_for_all_its_tests_and_fails_for_all(tmp_path, monkeypatch, one_turn):
    once = Recorder([(CASE, "rlvr_ops")], CPU, "c", quick=True, results=tmp_path)
    assert once.of(CASE) is once.of(CASE)
    assert len(once.results) == 1

    def off(*_, **__):
        raise AssertionError("further off than eager")

    failing = Recorder([(CASE, "rlvr_ops")], CPU, "c", quick=True, results=tmp_path)
    monkeypatch.setattr(bench_losses, "measure", off)
    for _ in range(2):
        with pytest.raises(AssertionError, match="further off than eager"):
            failing.of(CASE)


def test_every_stage_of_the_command_for_a_gpu_writes_what_it_finds(tmp_path, capsys):
    for stage in ("suite", "launches", "tuning"):
        assert not on_gpu.main(
            ["--stage", stage, "--tiny", "--device", "cpu", "--minutes", "1", "--out", str(tmp_path)]
        )
        assert ("ace-16x8x50-float32-100-active" in capsys.readouterr().out) == (stage != "tuning")
    assert {path.stem for path in (tmp_path / device_folder(CPU)).glob("*.json")} == {
        "ace-16x8x50-float32-100-active",
        "grpo-16x8x50-float32-50-active",
        "logps-16x8x50-float32-100-active",
    }
    rows = json.loads((tmp_path / "tuning.json").read_text())
    assert {row["what"] for row in rows} == {"linear_lse as chosen"}, "the others are for a GPU"
    assert not [row for row in rows if isinstance(row["ms"], str)]
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
    monkeypatch.setattr(on_gpu, "commit", lambda: {"id": "abc", "dirty": False})
    monkeypatch.setattr("benchmarks.results.commit", on_gpu.commit)
    return Stage("suite", tmp_path, CPU, time.monotonic() + 60, tiny=True)


def result_of(here):
    return json.loads((here.out / device_folder(CPU) / f"{LOSS.name}.json").read_text())


def broken(key):
    """The systems, of which one fails whenever it runs."""

    def load(case):
        def run(batch):
            raise RuntimeError("a kernel that has never run")

        return run

    return [replace(system, load=load) if system.key == key else system for system in SYSTEMS]


def test_the_suite_goes_on_where_an_earlier_run_has_stopped(tiny_stage, monkeypatch, capsys):
    every = {system.key for system in systems(LOSS)}
    some, path = every & {*on_gpu.FEW}, tiny_stage.out / device_folder(CPU) / f"{LOSS.name}.json"
    assert not on_gpu.is_there(path, some)
    assert on_gpu.run_case(LOSS, some, tiny_stage)
    assert on_gpu.is_there(path, some)
    assert not on_gpu.is_there(path, every), "most were not asked for"
    monkeypatch.delattr(on_gpu, "measure")
    assert on_gpu.run_case(LOSS, some, tiny_stage)
    assert f"{LOSS.name} is there from an earlier run" in capsys.readouterr().out
    for other in ({"id": "another", "dirty": False}, {"id": "abc", "dirty": True}, {"id": None, "dirty": None}):
        monkeypatch.setattr(on_gpu, "commit", lambda other=other: other)
        assert not on_gpu.is_there(path, some)


def test_a_system_of_ours_that_fails_leaves_the_others_their_results_and_is_tried_again(
    tiny_stage, monkeypatch, capsys
):
    monkeypatch.setattr("benchmarks.peers.SYSTEMS", broken("rlvr_ops-two_pass"))
    keys, path = {"rlvr_ops", "rlvr_ops-two_pass"}, tiny_stage.out / device_folder(CPU) / f"{LOSS.name}.json"
    assert not on_gpu.run_case(LOSS, keys, tiny_stage)
    assert "WRONG rlvr_ops, two_pass: RuntimeError: a kernel that has never run" in capsys.readouterr().out
    there = {row["key"] for row in result_of(tiny_stage)["systems"]}
    assert there >= {"rlvr_ops", "products", "eager-logsumexp"}
    assert not on_gpu.is_there(path, keys)
    assert on_gpu.is_there(path, {"rlvr_ops"})


def test_numbers_of_ours_that_are_off_are_timed_and_said(tiny_stage, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.measure.FLOAT32_NOISE", 0.0)
    monkeypatch.setattr("benchmarks.measure.TIE", 0.0)
    assert not on_gpu.run_case(LOSS, {"rlvr_ops"}, tiny_stage)
    assert "WRONG rlvr_ops: loss is" in capsys.readouterr().out
    stored = result_of(tiny_stage)
    rows = {row["key"]: row for row in stored["systems"]}
    assert rows["rlvr_ops"]["wrong"].startswith("rlvr_ops: loss is")
    assert wrong(stored["systems"], stored["absent"]), "nor is it when the run goes on"
    assert rows["rlvr_ops"]["median_ms"] > 0


def test_numbers_of_ours_that_are_off_fail_the_benchmark_and_are_not_stored(tmp_path, monkeypatch, one_turn):
    monkeypatch.setattr("benchmarks.measure.FLOAT32_NOISE", 0.0)
    monkeypatch.setattr("benchmarks.measure.TIE", 0.0)
    with pytest.raises(AssertionError, match="rlvr_ops: loss is"):
        Recorder([(LOSS, "rlvr_ops")], CPU, "c", quick=True, results=tmp_path).of(LOSS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "before", "systems_after", "cases_after"),
    [
        ("trl", ["cce-exact"], ["cce-exact", "trl"], []),
        ("eager-logsumexp", [], [], [LOSS.name]),
        ("trl", ["trl"], ["trl"], [LOSS.name]),
    ],
    ids=["a peer", "one that every case needs", "again"],
)
def test_what_breaks_the_device_is_left_out_of_the_next_process(
    key, before, systems_after, cases_after, tiny_stage, monkeypatch
):
    def lost(*_, **__):
        raise DeviceLostError(key, "an illegal memory access was encountered")

    path = tiny_stage.out / "lost.json"
    path.write_text(json.dumps({"systems": before, "cases": []}))
    with monkeypatch.context() as patch:
        patch.setattr(on_gpu, "measure", lost)
        assert on_gpu.suite(tiny_stage, [(LOSS, ["rlvr_ops"])]) == on_gpu.AGAIN
    assert json.loads(path.read_text()) == {"systems": systems_after, "cases": cases_after}
    assert on_gpu.suite(tiny_stage, [(LOSS, ["rlvr_ops"])]) == bool(cases_after)


def test_a_stage_that_has_lost_the_device_begins_again(tmp_path, monkeypatch):
    codes = [on_gpu.AGAIN, on_gpu.AGAIN, 0]
    monkeypatch.setattr(on_gpu, "run", lambda stage: codes.pop(0))
    assert on_gpu.main(["--device", "cpu", "--out", str(tmp_path), "--only", "suite"]) == 0
    assert not codes


def test_a_system_that_was_left_out_has_its_reason(tiny_stage):
    on_gpu.run_case(LOSS, {"rlvr_ops", "trl"}, tiny_stage, without=["trl"])
    absent = [(one["key"], one["reason"]) for one in result_of(tiny_stage)["absent"]]
    assert absent == [("trl", "has broken the device for all")]


def test_the_last_stage_may_take_all_that_is_left(tmp_path, monkeypatch):
    given = {}
    left = lambda here: here.end - time.monotonic()  # noqa: E731
    monkeypatch.setattr(on_gpu, "run", lambda here: given.setdefault(here.name, left(here)) and 0)
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
    state, end = Path(f"/proc/{pid.read_text()}/stat"), time.monotonic() + 5  # a killed process is gone a moment later
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < end, "still there"
        time.sleep(0.01)

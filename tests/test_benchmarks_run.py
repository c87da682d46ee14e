"""The commands: pytest --benchmark, and the one for a machine with a GPU, on toy shapes."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
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
from benchmarks.run import NOT_ASKED, DeviceLostError
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
        stage.main()
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
    assert "suite: exit 124" in capsys.readouterr().out


@pytest.fixture
def tiny_stage(tmp_path):
    return Stage(tmp_path, CPU, time.monotonic() + 60, tiny=True)


def test_the_suite_goes_on_where_an_earlier_run_has_stopped(tiny_stage):
    place, some = tiny_stage.out, gpu_suite.of_this(LOSS, gpu_suite.FEW)
    path = place / f"{LOSS.name}.json"
    assert not gpu_suite.is_there(path, some)
    assert gpu_suite.run(LOSS, some, tiny_stage, place)
    assert gpu_suite.is_there(path, some)
    assert not gpu_suite.is_there(path, gpu_suite.of_this(LOSS, None)), "most were not asked for"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"commit": {"id": "another", "dirty": False}}))
    assert not gpu_suite.is_there(path, some)


def test_a_system_of_ours_that_fails_leaves_the_others_their_results(tiny_stage, monkeypatch, capsys):
    def broken(case):
        def run(batch):
            raise RuntimeError("a kernel that has never run")

        return run

    ours = next(entry for entry in ENTRIES if entry.key == "rlvr_ops-two_pass")
    entries = [replace(ours, load=broken) if entry is ours else entry for entry in ENTRIES]
    monkeypatch.setattr("benchmarks.systems.ENTRIES", entries)
    keys = {"rlvr_ops", "rlvr_ops-two_pass"}
    assert not gpu_suite.run(LOSS, keys, tiny_stage, tiny_stage.out)
    assert "rlvr_ops, two_pass is absent: RuntimeError: a kernel that has never run" in capsys.readouterr().out
    stored = json.loads((tiny_stage.out / f"{LOSS.name}.json").read_text())
    assert {row["key"] for row in stored["systems"]} >= {"rlvr_ops", "products", "eager-logsumexp"}


def test_a_system_that_breaks_the_device_is_named_and_left_out_of_the_next_process(tiny_stage, monkeypatch):
    def lost(*_, **__):
        raise DeviceLostError("trl", "an illegal memory access was encountered")

    begun = []
    given = [
        "stage",
        "--tiny",
        "--device",
        "cpu",
        "--seconds",
        "60",
        "--out",
        str(tiny_stage.out),
        "--without",
        "cce-exact",
    ]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(gpu_suite, "measure", lost)
    monkeypatch.setattr(gpu_suite.os, "execv", lambda program, command: begun.append(command))
    gpu_suite.main()
    assert begun[0][1:3] == ["-m", "benchmarks.gpu_suite"]
    assert begun[0][-3:] == ["--without", "cce-exact", "trl"]
    monkeypatch.undo()
    without = tiny_stage._replace(without=("trl",))
    gpu_suite.run(LOSS, {"rlvr_ops", "trl"}, without, tiny_stage.out)
    reasons = {
        one["key"]: one["reason"] for one in json.loads((tiny_stage.out / f"{LOSS.name}.json").read_text())["absent"]
    }
    assert reasons["trl"] == "ended the device's context in an earlier case"
    assert reasons["verl-torch"] == NOT_ASKED


def test_the_last_stage_may_take_all_that_is_left(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(on_gpu, "run", lambda stage, chosen, seconds: given.setdefault(stage, seconds) and 0)
    on_gpu.main(["--device", "cpu", "--minutes", "10", "--out", str(tmp_path), "--only", "tests", "suite"])
    assert given["tests"] == pytest.approx(180, abs=5)
    assert given["suite"] == pytest.approx(600, abs=5)


def test_what_is_interrupted_has_time_for_its_last_words():
    talks = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('failed so far: 3')"
    process = subprocess.Popen([sys.executable, "-c", talks], stdout=subprocess.PIPE)
    assert on_gpu.ended(process, 2) == on_gpu.TIMED_OUT
    assert process.stdout.read() == b"failed so far: 3\n"

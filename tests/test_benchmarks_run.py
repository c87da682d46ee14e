"""The commands: pytest --benchmark, and the one for a machine with a GPU, on toy shapes."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_launches, gpu_suite, gpu_tuning, on_gpu, recorder
from benchmarks.cases import Case
from benchmarks.provenance import ROOT
from benchmarks.recorder import Recorder
from benchmarks.replay import REPLAY
from benchmarks.report import SCRATCH, device_folder
from benchmarks.systems import entries

CPU = torch.device("cpu")
CASE = Case("logps", 16, 8, 50, 4)
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
    assert [row["what"] for row in rows["launches"]][1:] == ["CUDA graph, auto", "CUDA graph, two_pass"]
    tuned = {row["what"] for row in rows["tuning"]}
    assert {"single_pass", "two_pass", "fused_policy", "lse_fold", "dlogits", "weigh", "linear_lse as chosen"} <= tuned
    assert {"fused_policy, one launch", "fused_policy, three launches"} <= tuned
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

"""The commands: pytest --benchmark, and the one for a machine with a GPU, on toy shapes."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rlvr_ops
from benchmarks import bench_losses, correct, on_gpu, stage, sweeps, training
from benchmarks.bench_losses import interleaved, record
from benchmarks.cases import LEADING, Case, cases, leading
from benchmarks.measure import DeviceLostError, Measured
from benchmarks.results import BEGAN, ROOT, device_folder, save
from benchmarks.stage import LOST, TIMED_OUT, Stage, collect
from benchmarks.systems import Missing, systems

CPU = torch.device("cpu")
CASE, LOSS = Case("logps", 16, 8, 50, 4), Case("ace", 16, 8, 50, 4)
OFF = "import benchmarks.measure as measure\nmeasure.FLOAT32_NOISE = measure.TIE = 0.0\n"  # nothing of ours is near enough


def bench(*arguments, plugins=ROOT):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark", "--benchmark-quick"]
    # A worker of pytest-xdist says so in its environment, and its own runs would take themselves for one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(plugins), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


def test_some_systems_of_some_cases_are_measured_with_what_their_ratios_need_and_stored_as_both_json(tmp_path):
    kept = tmp_path / "kept.json"
    asked = ("-k", "logps and (rlvr_ops or cce)", "--benchmark-columns=median,rounds")
    done = bench(*asked, f"--benchmark-json={kept}", f"--benchmark-results={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cut-cross-entropy" in done.stdout or torch.cuda.is_available()
    assert done.stdout.count(f"stored in {tmp_path}") == 1, "a case is measured once for all its tests"
    (stored,) = tmp_path.glob("*/*.json")
    result = json.loads(stored.read_text())
    rows = {row["key"]: row for row in result["systems"]}
    assert {"rlvr_ops", "products", "eager-cross_entropy", "eager-logsumexp"} <= rows.keys()
    assert {"device", "clocks", "versions", "commit", "command", "load_average"} <= result.keys()
    measured = {one["params"]["system"]: one for one in json.loads(kept.read_text())["benchmarks"]}
    assert measured["rlvr_ops"]["stats"]["median"] == pytest.approx(1e-3 * rows["rlvr_ops"]["median_ms"])
    assert measured["rlvr_ops"]["stats"]["rounds"] == rows["rlvr_ops"]["runs"] >= 3
    assert measured["rlvr_ops"]["extra_info"]["errors"] == rows["rlvr_ops"]["errors"]


def test_every_case_is_measured_once_for_all_its_systems(tmp_path):
    done = bench(f"--benchmark-results={tmp_path}", "-k", "(logps or frozen) and (rlvr_ops or products or eager-)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("*/*.json"))) == done.stdout.count(f"stored in {tmp_path}") == 2


def test_a_case_that_is_off_fails_all_its_tests_after_one_measurement(tmp_path):
    (tmp_path / "off.py").write_text(OFF)
    chosen = f"benchmarks/bench_losses.py::bench_loss[{cases('cpu', quick=True)[2].name}-"
    done = bench(
        "-p", "off", f"--benchmark-results={tmp_path}", f"{chosen}rlvr_ops]", f"{chosen}products]", plugins=tmp_path
    )
    assert done.returncode == 1
    assert done.stdout.count(f"stored in {tmp_path}") == 1
    assert "2 errors" in done.stdout
    assert "rlvr_ops: logps is" in done.stdout


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
                start = interleaved()
                target()
                self.seen.append(interleaved() - start)

    benchmark = Benchmark()
    found = Measured({"rlvr_ops": {"kind": "ours"}}, {}, {"rlvr_ops": [100.0, 300.0, 200.0]})
    bench_losses.bench_loss(found, "rlvr_ops", benchmark)
    assert benchmark.seen == pytest.approx([0.1, 0.3, 0.2])
    assert benchmark.extra_info == {"kind": "ours"}


@pytest.fixture
def one_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_losses, "DEVICE", CPU)
    monkeypatch.setattr(bench_losses, "rounds", lambda *_, **__: {"seconds": 0, "least": 1, "most": 1})
    monkeypatch.setattr(bench_losses, "RESULTS", tmp_path / "kept")
    monkeypatch.setattr(bench_losses, "SCRATCH", tmp_path / "scratch")


@pytest.mark.parametrize(
    ("some", "quick", "place"), [(False, True, "scratch"), (True, False, "scratch"), (False, False, "kept")]
)
def test_quick_and_partial_runs_never_overwrite_the_stored_results(some, quick, place, tmp_path, monkeypatch, one_turn):
    found = Measured({}, {}, {})
    monkeypatch.setattr(bench_losses, "measure", lambda *_, **__: found)
    keys = {"rlvr_ops"} if some else {system.key for system in systems(CASE)}
    assert record(CASE, keys, "c", quick=quick, results=None) is found
    assert [path.relative_to(tmp_path) for path in tmp_path.glob("**/*.json")] == [
        Path(place) / device_folder(CPU) / f"{CASE.name}.json"
    ]


@pytest.mark.parametrize("kept", [True, False])
def test_numbers_of_ours_that_are_off_fail_the_benchmark_and_are_stored_only_where_asked_for(
    kept, tmp_path, monkeypatch, one_turn
):
    monkeypatch.setattr("benchmarks.measure.FLOAT32_NOISE", 0.0)
    monkeypatch.setattr("benchmarks.measure.TIE", 0.0)
    with pytest.raises(AssertionError, match="rlvr_ops: loss is"):
        record(LOSS, {"rlvr_ops"}, "c", quick=True, results=tmp_path / "asked" if kept else None)
    assert bool(list(tmp_path.iterdir())) == kept
    if kept:
        rows = {row["key"]: row for row in result_of(tmp_path / "asked")["systems"]}
        assert rows["rlvr_ops"]["wrong"].startswith("rlvr_ops: loss is")
        assert rows["rlvr_ops"]["median_ms"] > 0


def test_a_system_of_ours_that_fails_leaves_the_others_their_results_and_is_tried_again(
    tmp_path, monkeypatch, one_turn, clean_commit
):
    def fails(batch):
        raise RuntimeError("a kernel that has never run")

    found = [
        SimpleNamespace(key=one.key, title=one.title, name=one.name, kind=one.kind, enter=lambda case: fails)
        if one.key == "rlvr_ops-two_pass"
        else one
        for one in systems(LOSS)
    ]
    monkeypatch.setattr("benchmarks.measure.systems", lambda case: found)
    keys = {"rlvr_ops", "rlvr_ops-two_pass"}
    with pytest.raises(AssertionError, match="rlvr_ops, two_pass: RuntimeError: a kernel that has never run"):
        record(LOSS, keys, "c", quick=True, results=tmp_path)
    there = {row["key"] for row in result_of(tmp_path)["systems"]}
    assert there >= {"rlvr_ops", "products", "eager-logsumexp"}
    path = tmp_path / device_folder(CPU) / f"{LOSS.name}.json"
    assert not on_gpu.is_there(path, keys)
    assert on_gpu.is_there(path, {"rlvr_ops"})


def result_of(place):
    return json.loads((place / device_folder(CPU) / f"{LOSS.name}.json").read_text())


@pytest.fixture
def clean_commit(monkeypatch):
    this = lambda: {"id": "abc", "dirty": False}  # noqa: E731
    monkeypatch.setattr("benchmarks.results.commit", this)


@pytest.fixture
def tiny_stage(tmp_path, clean_commit):
    return Stage("suite", tmp_path, CPU, time.monotonic() + 60, tiny=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--minutes", "0"], "--minutes must be > 0, got 0.0"),
        (["--only", "nothing"], "--only: invalid choice: 'nothing'"),
    ],
)
def test_what_cannot_be_asked_for_is_named(given, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        on_gpu.main(given)
    assert said in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_not_gone_on_with(tiny_stage):
    state = training.folder(tiny_stage, "training") / "checkpoints" / "step-000120" / "state.pt"
    state.parent.mkdir(parents=True)
    state.touch()
    ((label, _),) = training.runs(tiny_stage)
    assert label["steps_before"] == 0


def test_a_copy_that_is_not_installed_finds_its_packages():
    said = "import sys; sys.path.insert(0, sys.argv[1]); import benchmarks; from importlib.util import find_spec"
    said += "; sys.exit(not (find_spec('rlvr_kernels') and find_spec('rlvr_trainer')))"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", said, str(ROOT)], check=False).returncode == 0


def test_every_stage_is_rehearsed_in_under_two_minutes(tmp_path, capsys):
    began, tmp_path = time.monotonic(), tmp_path / "out"
    assert on_gpu.main(["--tiny", "--device", "cpu", "--minutes", "4", "--out", str(tmp_path)]) == 0
    assert time.monotonic() - began < 120
    said = capsys.readouterr().out
    ended = json.loads((tmp_path / "stages.json").read_text())["rows"]
    assert {row["stage"]: row["exit"] for row in ended} == dict.fromkeys(on_gpu.PLAN, 0)
    rows = {
        name: json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        for name in on_gpu.IN_PROCESS.keys() - {"scaling"}
    }
    kernels = {row["kernel"] for row in rows["kernels"]}
    assert kernels >= {
        "linear_lse",
        "linear_exp",
        "linear_exp, dlogits",
        "two steps, single_pass",
        "two steps, two_pass",
    }
    assert all(row["errors"].keys() == row["eager"].keys() for row in rows["kernels"])
    assert {row["given"] for row in rows["waits"]} == set(correct.WAITS)
    assert {row["form"] for row in rows["products"]} >= {"logits", "d_weight += fp32"}
    assert {(row["table"], row["tiling"]) for row in rows["tuning"]} == {("FOLD", "None"), ("LEAVE", "None")}
    assert 0 < rows["training"][0]["share_of_loss"] < 1
    assert {path.stem for path in tmp_path.glob("cpu-*/*.json")} == {
        "scaling", *(case.name for case in cases("cpu", quick=True)[:2])
    }  # fmt: skip
    assert "| **rlvr_ops** |" in said
    assert f"kernels: {len(rows['kernels'])} right" in said
    assert said.splitlines()[-1].startswith("| "), "targets come last"


def test_a_check_that_is_off_is_wrong_and_so_is_one_that_is_not_a_number():
    head = correct.make(correct.TINY, torch.empty(0), full=True)
    found = correct.scores(head, everything=True)
    assert "wrong" not in correct.distances(head, found)
    assert correct.distances(head, found | {"lse": found["lse"] + 0.01})["wrong"] == "lse"
    assert correct.distances(head, found | {"entropy": found["entropy"] * float("nan")})["wrong"] == "entropy"


def test_rows_of_this_commit_are_not_measured_again_and_those_of_another_are(tiny_stage, monkeypatch):
    asked = []

    def works(*names):
        return iter([({"name": name}, lambda name=name: asked.append(name) or {"ms": 1.0}) for name in names])

    collect(tiny_stage, works("a"))
    collect(tiny_stage, works("a", "b"))
    assert asked == ["a", "b"]
    monkeypatch.setattr("benchmarks.results.commit", lambda: {"id": "def", "dirty": False})
    collect(tiny_stage, works("a", "b"))
    assert asked == ["a", "b", "a", "b"]


def test_where_the_commit_is_not_known_only_what_this_run_has_written_is_good(tiny_stage, monkeypatch):
    monkeypatch.setattr("benchmarks.results.commit", lambda: {"id": None, "dirty": None})
    collect(tiny_stage, iter([({"name": "a"}, dict)]))
    assert not stage.kept(tiny_stage.rows)
    monkeypatch.setenv(BEGAN, str(time.time() - 60))
    assert stage.kept(tiny_stage.rows) == [{"name": "a"}]
    monkeypatch.setenv(BEGAN, str(time.time() + 60))
    assert not stage.kept(tiny_stage.rows)


def test_a_tiling_is_put_in_the_place_of_the_default_one(tiny_stage, monkeypatch):
    monkeypatch.setattr(sweeps, "FOLD_CANDIDATES", {("cpu", 0): ("one", "another")})
    collect(tiny_stage, sweeps.tilings(tiny_stage))
    rows = json.loads(tiny_stage.rows.read_text())["rows"]
    assert [(row["table"], row["tiling"]) for row in rows] == [("FOLD", "one"), ("FOLD", "another"), ("LEAVE", "None")]
    assert all(row["x_products"] > 0 for row in rows)


def test_no_tiling_wins_that_was_not_timed():
    assert sweeps.winners([{"table": "FOLD", "tiling": "a", "ms": "TypeError: ..."}]) == []


def test_a_row_says_why_it_has_no_numbers_and_only_what_is_wrong_fails_the_stage(tiny_stage, monkeypatch):
    def raises(error):
        raise error

    absent = [({"name": "a"}, lambda: raises(Missing("needs the package gguf"))), ({"name": "b"}, dict)]
    collect(tiny_stage, iter(absent))
    with pytest.raises(SystemExit, match="1"):
        collect(tiny_stage, iter([*absent, ({"name": "c"}, lambda: raises(RuntimeError("too many registers")))]))
    rows = json.loads(tiny_stage.rows.read_text())["rows"]
    assert [row.get("missing") or row.get("error") for row in rows] == [
        "needs the package gguf", None, "RuntimeError: too many registers"
    ]  # fmt: skip
    monkeypatch.setattr(stage, "check", lambda device: "an illegal memory access")
    with pytest.raises(SystemExit, match=str(LOST)):
        collect(tiny_stage, iter([({"name": "d"}, dict), ({"name": "e"}, dict)]))
    assert [row["name"] for row in json.loads(tiny_stage.rows.read_text())["rows"]] == ["a", "b", "c", "d"]
    with pytest.raises(SystemExit, match=str(TIMED_OUT)):
        collect(tiny_stage._replace(end=0.0), iter([({"name": "f"}, dict)]))


def test_a_stage_that_cannot_be_started_leaves_the_others_their_turns(tmp_path, monkeypatch, clean_commit):
    def fails(here):
        if here.name == "kernels":
            raise OSError("no space left")
        return 0

    monkeypatch.setattr(on_gpu, "perform", fails)
    found = on_gpu.take_turns(tmp_path, CPU, time.monotonic() + 600, ["kernels", "main"], tiny=True)
    assert found == {"kernels": on_gpu.FAILED, "main": 0}


def test_an_interrupted_training_says_what_it_has_shown_and_goes_on_from_its_checkpoint(tiny_stage, monkeypatch):
    asked = []
    monkeypatch.setattr(training, "train", lambda here, done: asked.append(done) or ({"left": 80} if not done else {}))
    with pytest.raises(SystemExit, match=str(TIMED_OUT)):
        collect(tiny_stage, training.runs(tiny_stage))
    state = training.folder(tiny_stage, "training") / "checkpoints" / "step-000120" / "state.pt"
    state.parent.mkdir(parents=True)
    state.touch()
    collect(tiny_stage, training.runs(tiny_stage))
    assert asked == [0, 120]


def test_a_stage_that_has_lost_its_device_begins_again(tiny_stage, monkeypatch):
    codes = [LOST, LOST, 1]
    monkeypatch.setattr(on_gpu, "run", lambda here, *command: codes.pop(0))
    assert on_gpu.perform(tiny_stage._replace(name="kernels")) == 1
    assert not codes


def test_stages_out_of_time_get_another_turn_and_what_has_ended_well_is_not_done_again(
    tmp_path, monkeypatch, clean_commit
):
    done = []
    monkeypatch.setattr(on_gpu, "perform", lambda here: done.append(here.name) or codes[here.name].pop(0))
    turns = lambda: on_gpu.take_turns(tmp_path, CPU, time.monotonic() + 600, list(codes), tiny=True)  # noqa: E731
    codes = {"kernels": [0], "suite": [TIMED_OUT, TIMED_OUT, 0], "tests": [1], "tuning": [TIMED_OUT, 0]}
    assert turns() == {"kernels": 0, "suite": 0, "tests": 1, "tuning": 0}
    assert done == ["kernels", "suite", "tests", "tuning", "suite", "tuning", "suite"]
    codes["tests"] = [0]
    assert turns()["tests"] == 0
    assert done[7:] == ["tests"]


def test_the_trainers_updates_say_what_they_spend_in_the_head(tmp_path):
    def update(policy, step):
        rlvr_ops.token_logps(torch.zeros(2, 3), torch.ones(5, 3), torch.tensor([0, 1]))
        return {"loss": 1.0}

    path = tmp_path / "head.jsonl"
    assert training.watched(update, CPU, path)("policy", 6) == {"loss": 1.0}
    (row,) = training.read(path)
    assert row["step"] == 7
    assert row["scores"] > 0 == row["loss"]
    metrics = [{"step": 7, "perf/seconds_step": 4 * row["scores"], "perf/seconds_generate": 0.5, "num_tokens": 10}]
    found = training.shown([*metrics, {"step": 7, "eval/pass@1": 0.5}], [row])
    assert found["share_of_scores"] == pytest.approx(0.25)
    assert found["steps"] == 1


def test_the_winner_is_the_tiling_that_is_fastest_over_all_shapes():
    times = [("FOLD", "a", 1.2), ("FOLD", "a", 1.2), ("FOLD", "b", 1.1), ("FOLD", "b", 1.4), ("LEAVE", "a", 2.0)]
    rows = [{"table": table, "tiling": tiling, "x_products": x} for table, tiling, x in times]
    rows.append({"table": "LEAVE", "tiling": "c", "ms": "out of resources"})
    assert sweeps.winners(rows) == [
        "fastest: FOLD[...] = a  # 1.200 x products",
        "fastest: LEAVE[...] = a  # 2.000 x products",
    ]


def test_a_stage_is_ended_when_its_time_is_up(tmp_path, capsys):
    on_gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path), "--minutes", "0.08", "--only", "scaling"])
    assert "scaling: out of time" in capsys.readouterr().out


def test_the_suite_goes_on_where_an_earlier_run_has_stopped(tiny_stage, monkeypatch):
    case, folder = cases("cpu", quick=True)[1], tiny_stage.out / device_folder(CPU)
    every = on_gpu.remaining(tiny_stage, lost=())
    assert every == [f"benchmarks/bench_losses.py::bench_loss[{case.name}-{key}]" for key in on_gpu.FEW]
    rows = {key: {"key": key} for key in on_gpu.FEW if key != "trl"}
    absent = {"trl": {"key": "trl", "name": "TRL", "reason": "trl is not installed"}}
    path = folder / f"{case.name}.json"
    assert not on_gpu.is_there(path, on_gpu.FEW)
    save(case, Measured(rows, absent, {}), CPU, "c", folder)
    assert on_gpu.is_there(path, on_gpu.FEW)
    assert not on_gpu.is_there(path, {system.key for system in systems(case)}), "most were not asked for"
    assert on_gpu.remaining(tiny_stage, lost=()) == []
    for other in ({"id": "another", "dirty": False}, {"id": "abc", "dirty": True}, {"id": None, "dirty": None}):
        monkeypatch.setattr("benchmarks.results.commit", lambda other=other: other)
        assert not on_gpu.is_there(path, on_gpu.FEW)


def test_the_leading_cases_come_with_few_systems_and_the_suite_with_all(tiny_stage):
    real = tiny_stage._replace(tiny=False)
    assert len(on_gpu.remaining(real._replace(name="main"), ())) == len(on_gpu.FEW)
    assert len(on_gpu.remaining(real, ())) == sum(len(systems(case)) for case in cases("cpu", quick=False))
    shapes = [(case.rows, case.hidden, case.vocabulary) for case in leading(cases("cuda", quick=False))]
    assert shapes == LEADING


@pytest.mark.parametrize(
    ("error", "name"),
    [(DeviceLostError("trl"), "trl"), (RuntimeError("while it was timed"), LOSS.name)],
    ids=["a peer", "nobody knows which"],
)
def test_what_breaks_the_device_ends_the_session_and_is_named(error, name, monkeypatch, one_turn):
    def lost(*_, **__):
        raise error

    monkeypatch.setattr(bench_losses, "measure", lost)
    monkeypatch.setattr(bench_losses, "check", lambda device: "an illegal memory access was encountered")
    with pytest.raises(pytest.exit.Exception, match=f"LOST {name}: an illegal"):
        record(LOSS, {"rlvr_ops"}, "c", quick=True, results=None)


def test_a_system_that_every_case_needs_and_that_breaks_the_device_names_the_case(monkeypatch):
    def broken(case):
        raise RuntimeError("an illegal memory access was encountered")

    found = [SimpleNamespace(key="eager-logsumexp", title="eager", name="eager", kind="eager", enter=broken)]
    monkeypatch.setattr("benchmarks.measure.systems", lambda case: found)
    monkeypatch.setattr("benchmarks.measure.check", lambda device: "lost")
    with pytest.raises(DeviceLostError, match=LOSS.name):
        bench_losses.measure(LOSS, CPU, {"rlvr_ops"}, seconds=0, least=1, most=1)


def test_a_session_that_has_lost_the_device_begins_again_without_what_broke_it(tiny_stage, monkeypatch):
    suite = cases("cpu", quick=False)
    lost, asked = ["trl", suite[0].name], []

    def run(here, *command):
        asked.append([one for one in command if "::" in one])
        with here.log.open("a") as log:
            log.write(
                f"!!! _pytest.outcomes.Exit: LOST {lost.pop(0)}: an illegal access !!!\n" if lost else "3 passed\n"
            )
        return 1 if len(asked) < 3 else 0

    monkeypatch.setattr(on_gpu, "run", run)
    on_gpu.measure(tiny_stage._replace(tiny=False))
    first, second, third = asked
    assert [one for one in first if one not in second] == [one for one in first if one.endswith("-trl]")] != []
    assert [one for one in second if one not in third] == [one for one in second if f"[{suite[0].name}-" in one] != []


def test_the_last_stage_may_take_all_that_is_left(tmp_path, monkeypatch):
    given = {}
    left = lambda here: here.end - time.monotonic()  # noqa: E731
    monkeypatch.setattr(on_gpu, "perform", lambda here: given.setdefault(here.name, left(here)) and 0)
    on_gpu.main(["--device", "cpu", "--minutes", "10", "--out", str(tmp_path), "--only", "tests", "suite"])
    assert given["tests"] == pytest.approx(on_gpu.PLAN["tests"], abs=5)
    assert given["suite"] == pytest.approx(on_gpu.PLAN["suite"], abs=5)
    on_gpu.main(["--device", "cpu", "--minutes", "10", "--out", str(tmp_path), "--only", "graphs"])
    assert given["graphs"] == pytest.approx(600 - on_gpu.LAST_WORDS, abs=5)


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
    assert on_gpu.ended(process, 0.5) == TIMED_OUT
    assert process.stdout.read() == b"failed so far: 3\n"
    state, end = Path(f"/proc/{pid.read_text()}/stat"), time.monotonic() + 5  # a killed process is gone a moment later
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < end, "still there"
        time.sleep(0.01)

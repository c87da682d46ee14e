import json

import pytest

from benchmarks import chart
from benchmarks.chart import shows
from benchmarks.results import RESULTS, compared, devices, load, markdown

CASE = {
    "loss": "ace", "rows": 1024, "hidden": 896, "vocabulary": 151936, "rollouts": 8, "dtype": "float32", "active": 1.0,
    "peaked": False, "entropy": False, "frozen": False, "active_rows": 1024, "products": 3,
}  # fmt: skip


def row(key, kind, median, *, peak=10**9, error=1e-6):
    return {
        "key": key, "system": key, "kind": kind, "median_ms": median, "p20_ms": median, "p80_ms": median, "min_ms": median,
        "runs": 3, "tflops": 0.1, "share_of_products": 0.5, "ratio_to_eager": 0.5, "peak_bytes": peak,
        "workspace_bytes": peak // 2, "errors": {"logps": error, "d_hidden": error, "d_weight": error, "loss": error},
    }  # fmt: skip


def result(*rows, **case):
    return {
        "case": CASE | case, "device": "a device", "clocks": {"mean": "2000 MHz"}, "load_average": 0.5,
        "versions": {"torch": "1"}, "float32_matmul_precision": "highest", "commit": {"id": "abc", "dirty": False},
        "command": "pytest --benchmark", "systems": list(rows),
        "absent": [{"key": "quack-floor", "name": "QuACK", "reason": "quack-kernels is not installed"}],
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """Two devices; the first has the sizes varied, too."""
    point = {"rows": 8, "hidden": 8, "vocabulary": 8, "median_ms": 1.0, "peak_bytes": 10}
    points = [{**point, "varied": "N"}, {**point, "varied": "N", "rows": 16, "median_ms": 2.0, "peak_bytes": 20}]
    scaling = {
        "device": "d",
        "versions": {"torch": "1"},
        "points": points,
        "exponents": {"N": {"time": 1, "memory": 1}},
    }
    for device in ("cpu-slow", "cuda-fast"):
        folder = tmp_path / "results" / device
        folder.mkdir(parents=True)
        stored = result(row("rlvr_ops", "ours", 5.0), row("torch-floor", "floor", 4.0))
        (folder / "ace.json").write_text(json.dumps(stored))
    (tmp_path / "results" / "cpu-slow" / "scaling.json").write_text(json.dumps(scaling))
    (tmp_path / "benchmarks.md").write_text(f"before\n{chart.BEGIN}\nold\n{chart.END}\nafter\n")
    return tmp_path / "results"


def test_the_page_holds_the_stored_results_and_no_others():
    assert chart.generated(RESULTS) in chart.PAGE.read_text(), "run python -m benchmarks.chart"


def test_every_plot_shows_the_stored_results_and_there_is_no_other():
    drawn = chart.every_plot(RESULTS)
    stale = [name for name, data in drawn.items() if not shows(chart.PAGE.parent / name, data)]
    assert not stale, "run python -m benchmarks.chart"
    there = {f"plots/{path.name}" for path in (chart.PAGE.parent / "plots").iterdir()}
    assert there == {name for name in drawn if name.startswith("plots/")}


def test_one_command_writes_the_page_and_all_plots_and_removes_what_is_gone(results, tmp_path):
    page = tmp_path / "benchmarks.md"
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "of-a-device-that-is-gone.svg").write_text("")
    chart.main(results, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.index("### cuda-fast") < text.index("### cpu-slow")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        *(f"{device}-{plot}.svg" for device in ("cuda-fast", "cpu-slow") for plot in ("time", "memory", "error")),
        "cpu-slow-scaling.svg",
    }
    assert chart.rewrite(text, results) == text


def test_a_plot_or_a_page_that_was_made_from_other_results_is_noticed(results, tmp_path):
    page = tmp_path / "benchmarks.md"
    chart.main(results, page)
    path = results / "cuda-fast" / "ace.json"
    path.write_text(path.read_text().replace("5.0", "5.5"))
    assert chart.rewrite(page.read_text(), results) != page.read_text()
    noticed = {name for name, data in chart.every_plot(results).items() if not shows(tmp_path / name, data)}
    assert noticed == {"chart.png", "plots/cuda-fast-time.svg"}


def test_gpus_come_first_and_folders_without_results_not_at_all(results):
    (results / "cpu-empty").mkdir()
    assert [path.name for path in devices(results)] == ["cuda-fast", "cpu-slow"]
    assert [stored["case"]["rows"] for stored in load(results / "cpu-slow")] == [1024]


def test_a_floor_is_marked_and_an_absent_system_has_its_reason():
    text = markdown([result(row("torch-floor", "floor", 4.0), row("rlvr_ops", "ours", 5.0))])
    assert "| torch-floor (floor) |" in text
    assert "| **rlvr_ops** |" in text
    assert "- QuACK: quack-kernels is not installed (1 of the cases)" in text


def test_what_was_measured_stands_beside_its_target():
    whole = result(
        row("rlvr_ops", "ours", 11.5),
        row("products", "products", 10.0),
        row("trl", "peer", 10.0),
        row("e", "eager", 20.0),
    )
    # A slower quarter of an hour: 7.5 / 7.5 of its products against 11.5 / 10, of half the work
    half = result(row("rlvr_ops", "ours", 7.5), row("products", "products", 7.5), active=0.5, active_rows=512)
    lines = list(compared([whole, half], "cpu"))
    assert "ace-1024x896x151936-float32-100-active  rlvr_ops: 1.15 x products (target 1.1) NOT MET" in lines
    assert "ace-1024x896x151936-float32-100-active  rlvr_ops: 0.575 x eager (target 0.85) ok" in lines
    assert "ace-1024x896x151936-float32-100-active  rlvr_ops: 1.15 x trl (target 0.6) NOT MET" in lines
    assert (
        "ace-1024x896x151936-float32-100-active  rlvr_ops: 0.5 x eager's peak in workspace (target 0.143) NOT MET"
        in lines
    )
    assert (
        "ace-1024x896x151936-float32-50-active  rlvr_ops: 0.435 x our own time for all rows (target 0.55) ok" in lines
    )
    assert not [line for line in lines if "error" in line]
    assert not list(compared([whole], "cuda")), "its targets are for bfloat16"
    lines = list(compared([whole | {"case": whole["case"] | {"dtype": "bfloat16"}}], "cuda"))
    assert "ace-1024x896x151936-bfloat16-100-active  rlvr_ops: 1.15 x products (target 1.15) ok" in lines
    assert "ace-1024x896x151936-bfloat16-100-active  rlvr_ops: 1 x TRL's error of logps (target 1.01) ok" in lines
    assert "ace-1024x896x151936-bfloat16-100-active  rlvr_ops: 1 x eager's error of d_weight (target 1.01) ok" in lines
    toy = result(row("rlvr_ops", "ours", 5.0), row("products", "products", 1.0), vocabulary=50)
    assert not list(compared([toy], "cpu"))

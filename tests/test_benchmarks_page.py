import json

import pytest

from benchmarks import chart
from benchmarks.results import RESULTS, ROOT, devices, load, markdown

DOCS = ROOT / "docs"
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
    point = {
        "rows": 8, "hidden": 8, "vocabulary": 8, "median_ms": 1.0, "peak_bytes": 10, "products_ms": 1.0,
        "predicted_ms": 1.0, "measured_over_predicted": 1.0, "predicted_peak_bytes": 10,
    }  # fmt: skip
    points = [{**point, "varied": "N"}, {**point, "varied": "N", "rows": 16, "median_ms": 2.0, "peak_bytes": 20}]
    scaling = {
        "device": "d", "versions": {"torch": "1"}, "points": points, "exponents": {"N": {"time": 1, "memory": 1}},
        "rates": {"matmul_flops": 1e9, "bytes_per_second": 1e9}, "command": "python",
    }  # fmt: skip
    for device in ("cpu-slow", "cuda-fast"):
        folder = tmp_path / "results" / device
        folder.mkdir(parents=True)
        stored = result(row("rlvr_ops", "ours", 5.0), row("torch-floor", "floor", 4.0))
        (folder / "ace.json").write_text(json.dumps(stored))
    (tmp_path / "results" / "cpu-slow" / "scaling.json").write_text(json.dumps(scaling))
    sections = {"benchmarks.md": ["results"], "scaling.md": ["predicted", "measured"]}
    for page, names in sections.items():
        blocks = "between\n".join(f"{chart.BEGIN.format(name)}\nold\n{chart.END}\n" for name in names)
        (tmp_path / page).write_text(f"before\n{blocks}after\n")
    return tmp_path / "results"


def test_the_page_holds_the_stored_results_and_no_others():
    assert chart.generated(RESULTS) in (DOCS / "benchmarks.md").read_text(), "run python -m benchmarks.chart"


@pytest.mark.parametrize("page", ["benchmarks.md", "scaling.md"])
def test_a_page_is_what_the_command_writes(page):
    text = (DOCS / page).read_text()
    assert chart.rewrite(text, RESULTS) == text, "run python -m benchmarks.chart"


def test_every_plot_shows_the_stored_results_and_there_is_no_other():
    drawn = chart.every_plot(RESULTS)
    stale = [name for name, plot in drawn.items() if not plot.is_in(DOCS / name)]
    assert not stale, "run python -m benchmarks.chart"
    there = {f"plots/{path.name}" for path in (DOCS / "plots").iterdir()}
    assert there == {name for name in drawn if name.startswith("plots/")}


def test_one_command_writes_the_pages_and_all_plots_and_removes_what_is_gone(results, tmp_path):
    page, scaling = tmp_path / "benchmarks.md", tmp_path / "scaling.md"
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "of-a-device-that-is-gone.svg").write_text("")
    chart.main(results, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.index("### cuda-fast") < text.index("### cpu-slow")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "cuda-fast.svg", "cpu-slow.svg", "cpu-slow-scaling.svg",
    }  # fmt: skip
    assert chart.rewrite(text, results) == text
    text = scaling.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "between" in text
    assert "plots/cpu-slow-scaling.svg" in text


def test_a_plot_or_a_page_that_was_made_from_other_results_is_noticed(results, tmp_path):
    page = tmp_path / "benchmarks.md"
    chart.main(results, tmp_path)
    path = results / "cuda-fast" / "ace.json"
    path.write_text(path.read_text().replace("5.0", "5.5"))
    assert chart.rewrite(page.read_text(), results) != page.read_text()
    noticed = {name for name, plot in chart.every_plot(results).items() if not plot.is_in(tmp_path / name)}
    assert noticed == {"chart.png", "plots/cuda-fast.svg"}


def test_gpus_come_first_and_folders_without_results_not_at_all(results):
    (results / "cpu-empty").mkdir()
    assert [path.name for path in devices(results)] == ["cuda-fast", "cpu-slow"]
    assert [stored["case"]["rows"] for stored in load(results / "cpu-slow")] == [1024]


def test_a_floor_is_marked_and_an_absent_system_has_its_reason():
    text = markdown([result(row("torch-floor", "floor", 4.0), row("rlvr_ops", "ours", 5.0))])
    assert "| torch-floor (floor) |" in text
    assert "| **rlvr_ops** |" in text
    assert "- QuACK: quack-kernels is not installed (1 of the cases)" in text

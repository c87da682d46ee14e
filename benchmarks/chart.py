"""Draw docs/chart.png and write the tables of docs/benchmarks.md, from the stored results and nothing else.

python -m benchmarks.chart [DEVICE_FOLDER]
"""

import math
import sys
from pathlib import Path

from benchmarks.report import RESULTS, Result, load, markdown, provenance

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- results: written by python -m benchmarks.chart -->", "<!-- end of results -->"
COLOURS = {
    "rlvr_ops": "#1b6ca8",
    "eager, cross_entropy": "#a8a8a8",
    "eager, logsumexp": "#c4c4c4",
    "eager, cross_entropy on active rows": "#dedede",
}


def draw(results: list[Result], path: Path) -> None:
    """Time and memory of ace_loss at the largest shape, all rows and some rows active; eager beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ace = [r for r in results if r["case"]["loss"] == "ace" and not r["case"]["peaked"]]
    size = max(r["case"]["rows"] * r["case"]["vocabulary"] for r in ace)
    shown = [r for r in ace if r["case"]["rows"] * r["case"]["vocabulary"] == size]
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for axes, key, unit, label in [
        (time, "median_ms", 1e3, "seconds"),
        (memory, "peak_bytes", 1e9, "GB above the inputs"),
    ]:
        for i, (name, colour) in enumerate(COLOURS.items()):
            heights = [_value(result, name, key) / unit for result in shown]
            places = [group + 0.22 * (i - 1) for group in range(len(shown))]
            bars = axes.bar(places, heights, 0.2, color=colour, label=name)
            axes.bar_label(bars, ["" if math.isnan(height) else f"{height:.2f}" for height in heights], fontsize=8)
        axes.set_xticks(range(len(shown)), [_rows(result) for result in shown])
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    case = shown[0]["case"]
    figure.suptitle(
        f"ace_loss forward + backward, N={case['rows']} H={case['hidden']} V={case['vocabulary']} {case['dtype']}\n"
        f"{shown[0]['device']}, torch {shown[0]['versions']['torch']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _value(result: Result, system: str, key: str) -> float:
    """The measured value, or not a number for a system that this case does not have."""
    return float(next((row[key] for row in result["systems"] if row["system"] == system), math.nan))


def _rows(result: Result) -> str:
    share = result["case"]["active"]
    return "every rollout has an advantage" if share == 1 else f"{share:.0%} of them have"


def tables(results: list[Result]) -> str:
    """What stands between the markers in docs/benchmarks.md."""
    return f"{BEGIN}\n{provenance(results)}\n\n{markdown(results)}\n{END}"


def rewrite(page: str, results: list[Result]) -> str:
    """The page with its tables replaced."""
    before, rest = page.split(BEGIN)
    return before + tables(results) + rest.split(END)[1]


if __name__ == "__main__":
    stored = load(Path(sys.argv[1]) if len(sys.argv) > 1 else sorted(RESULTS.iterdir())[0])
    draw(stored, DOCS / "chart.png")
    page = DOCS / "benchmarks.md"
    page.write_text(rewrite(page.read_text(), stored))

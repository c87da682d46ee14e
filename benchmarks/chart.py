"""Write the results into docs/benchmarks.md and draw its plots, from the stored JSON and nothing else.

python -m benchmarks.chart
"""

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.results import ERRORS, RESULTS, ROOT, Result, case_of, devices, load, markdown, origin

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results: written by python -m benchmarks.chart -->", "<!-- end of results -->"
COLOURS = {"ours": "#1b6ca8", "eager": "#9a9a9a", "peer": "#d9a441", "floor": "#dccfae", "products": "#3b3b3b"}
SIZES = {"N": "rows", "H": "hidden", "V": "vocabulary", "ranks": "ranks"}
TIME = {"milliseconds, median": ("median_ms", 1.0)}
MEMORY = {"peak MB above the inputs, returned gradients included": ("peak_bytes", 1e6)}
DISTANCE = {f"distance of {what} from float64": (what, 1.0) for what in ERRORS}
Data = dict[str, Any]
"""What a plot shows, so that a test can tell whether a file still shows it."""


def bars(results: list[Result], values: dict[str, tuple[str, float]]) -> Data:
    """For each result and each value (its key and unit) a panel of the systems that have it, the smallest first."""
    panels: Data = {}
    for result, (what, (key, unit)) in itertools.product(results, values.items()):
        case, rows = case_of(result), (row | row.get("errors", {}) for row in result["systems"])
        title = "forward only" if case.forward else f"{case.loss}_loss, {case.active:.0%} of rollouts active"
        shown = [[row["system"], row["kind"], row[key] / unit] for row in rows if key in row]
        panels[f"{title}: {what}"] = sorted(shown, key=lambda row: row[2])
    case, made = case_of(results[0]), _made(results[0])
    return {"heading": f"N={case.rows} H={case.hidden} V={case.vocabulary} {case.dtype}\n{made}", "panels": panels}


def curves(stored: Result) -> Data:
    """Time and memory against each size that was varied, with the fitted exponents."""
    found: Data = {}
    for varied, points in itertools.groupby(stored["points"], lambda point: point["varied"]):
        values = [[point[key] for key in (SIZES[varied], "median_ms", "peak_bytes")] for point in points]
        found[varied] = {"exponents": stored["exponents"][varied], "points": values}
    return {"heading": _made(stored), "curves": found}


def _made(stored: Result) -> str:
    return f"{stored['device']}, torch {stored['versions']['torch']}"


def every_plot(results: Path) -> dict[str, Data]:
    """All plots, by their place in docs/: of the plain cases of the largest shape that has several; the README's is the
    first device's."""
    found: dict[str, Data] = {}
    for place in devices(results):
        stored, scaling, name = load(place), place / "scaling.json", f"plots/{place.name}"
        if stored:
            counts = Counter(map(_shape, stored))  # the largest come first
            main = next((shape for shape, count in counts.items() if count > 1), _shape(stored[0]))
            shown = [result for result in stored if _shape(result) == main]
            plain = [one for one in shown if case_of(one).active in (1, 0.5) and not case_of(one).kinds]
            found |= {f"{name}-time.svg": bars(plain, TIME), f"{name}-memory.svg": bars(plain, MEMORY)}
            found[f"{name}-error.svg"] = bars(shown[:1], DISTANCE)
            found.setdefault("chart.png", bars(shown[:1], TIME | MEMORY))
        if scaling.exists():
            found[f"{name}-scaling.svg"] = curves(json.loads(scaling.read_text()))
    return found


def _shape(result: Result) -> tuple[object, ...]:
    return tuple(result["case"][key] for key in ("rows", "hidden", "vocabulary", "dtype"))


def draw(data: Data, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rlvr_ops", "font.size": 9}):
        figure = Figure(layout="constrained")
        figure.suptitle(data["heading"], fontsize=10)
        (_draw_bars if "panels" in data else _draw_curves)(figure, data)
        nothing = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Description": digest(data), **nothing})


def _draw_bars(figure: Any, data: Data) -> None:
    heights = [2 + len(rows) for rows in data["panels"].values()]
    figure.set_size_inches(9, 0.9 + 0.21 * sum(heights))
    grid = figure.subplots(len(heights), height_ratios=heights, squeeze=False).flat
    for axes, (title, rows) in zip(grid, data["panels"].items(), strict=True):
        names, kinds, values = zip(*rows, strict=True)
        drawn = axes.barh(names, values, color=[COLOURS[kind] for kind in kinds])
        axes.bar_label(drawn, [f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values], padding=2)
        axes.set_title(title, fontsize=9, loc="left")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)


def _draw_curves(figure: Any, data: Data) -> None:
    figure.set_size_inches(2.6 * len(data["curves"]) + 0.6, 5)
    grid = figure.subplots(2, len(data["curves"]), squeeze=False)
    for column, (varied, curve) in enumerate(data["curves"].items()):
        sizes, ms, peaks = zip(*curve["points"], strict=True)
        measured = {"time": ("ms", ms), "memory": ("MB above the inputs", [peak / 1e6 for peak in peaks])}
        for axes, (what, (unit, values)) in zip(grid[:, column], measured.items(), strict=True):
            axes.loglog(sizes, values, "o-", color=COLOURS["ours"])
            axes.set_yticks(values, [f"{value:.3g}" for value in values])
            axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
            axes.set_title(f"{what} ~ {varied}^{curve['exponents'][what]:.2f}", fontsize=9)
            axes.set(xlabel=varied, ylabel=unit)
            axes.minorticks_off()
            axes.grid(alpha=0.3)


def digest(data: Data) -> str:
    return "data " + hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:24]


def shows(path: Path, data: Data) -> bool:
    return path.exists() and digest(data).encode() in path.read_bytes()


def generated(results: Path) -> str:
    """What stands between the markers in docs/benchmarks.md."""
    parts, drawn = [BEGIN], [name.rpartition("-") for name in every_plot(results)]
    for place in devices(results):
        stored = load(place)
        plots = [f"![{what[:-4]} on {place.name}]({of}-{what})" for of, _, what in drawn if of == f"plots/{place.name}"]
        parts += [f"### {place.name}", *([origin(stored)] if stored else []), *plots]
        parts += [markdown(stored)] if stored else []
    return "\n\n".join([*parts, END])


def rewrite(page: str, results: Path) -> str:
    before, rest = page.split(BEGIN)
    return before + generated(results) + rest.split(END)[1]


def main(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write the page and its plots, and remove the plots of what is no longer there."""
    drawn = every_plot(results)
    for stale in {*page.parent.glob("plots/*.svg")} - {page.parent / name for name in drawn}:
        stale.unlink()
    for name, data in drawn.items():
        draw(data, page.parent / name)
    page.write_text(rewrite(page.read_text(), results))


if __name__ == "__main__":
    main()

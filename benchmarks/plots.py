"""The plots of stored results. What a plot shows is data first, so that a test can tell whether a file still shows it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import Result

COLOURS = {"ours": "#1b6ca8", "eager": "#9a9a9a", "peer": "#d9a441", "floor": "#dccfae", "products": "#3b3b3b"}
Data = dict[str, Any]


def main_shape(results: list[Result]) -> list[Result]:
    """The cases of the largest shape and dtype that has several, or of the largest at all."""
    shapes: dict[tuple[int, int, int, str], list[Result]] = {}
    for result in results:
        case = result["case"]
        shapes.setdefault((case["rows"], case["hidden"], case["vocabulary"], case["dtype"]), []).append(result)
    several = {shape: mine for shape, mine in shapes.items() if len(mine) > 1} or shapes
    return several[max(several, key=lambda shape: shape[0] * shape[1] * shape[2])]


def title_of(result: Result) -> str:
    """What is special about a case, in few words."""
    case = result["case"]
    if case["loss"] == "logps":
        return "forward only"
    kinds = [kind for kind in ("peaked", "entropy", "frozen") if case[kind]]
    share = "all rows" if case["active"] == 1 else f"{case['active']:.0%} of rollouts active"
    return ", ".join([f"{case['loss']}_loss", share, *kinds])


def bars(results: list[Result], key: str, unit: float) -> Data:
    """For the plain cases with all and with half of the rollouts active: system, kind and value, the smallest first."""
    panels = {}
    for result in main_shape(results):
        case = result["case"]
        if case["active"] not in (1, 0.5) or case["peaked"] or case["entropy"] or case["frozen"]:
            continue
        rows = [row for row in result["systems"] if row.get(key) is not None]
        rows.sort(key=lambda row: row[key])
        panels[title_of(result)] = [[row["system"], row["kind"], round(row[key] / unit, 6)] for row in rows]
    return {"heading": _heading(results), "panels": panels}


def error_data(results: list[Result]) -> Data:
    """Errors of the first case of the main shape, for each system that has any."""
    first = main_shape(results)[0]
    rows = [[row["system"], row["kind"], row.get("errors", {})] for row in first["systems"]]
    shown = ("logps", "d_hidden", "d_weight")
    rows = [[name, kind, {k: errors[k] for k in shown if k in errors}] for name, kind, errors in rows]
    return {"heading": f"{_heading(results)}\n{title_of(first)}", "rows": [row for row in rows if row[2]]}


def _heading(results: list[Result]) -> str:
    first = main_shape(results)[0]
    case = first["case"]
    shape = f"N={case['rows']} H={case['hidden']} V={case['vocabulary']} {case['dtype']}"
    return f"{shape}\n{first['device']}, torch {first['versions']['torch']}"


def scaling_data(stored: Result) -> Data:
    """Time and memory against each size that was varied, with the fitted exponents."""
    size = {"N": "rows", "H": "hidden", "V": "vocabulary", "ranks": "ranks"}
    curves: dict[str, Any] = {}
    for point in stored["points"]:
        curve = curves.setdefault(point["varied"], {"exponents": stored["exponents"][point["varied"]], "points": []})
        curve["points"].append([point[size[point["varied"]]], point["median_ms"], point["peak_bytes"]])
    return {"heading": f"{stored['device']}, torch {stored['versions']['torch']}", "curves": curves}


def digest(data: Data) -> str:
    """What identifies the data in a plot's file."""
    return "data " + hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:24]


def shows(path: Path, data: Data) -> bool:
    """Whether the file is a plot of this data."""
    return path.exists() and digest(data).encode() in path.read_bytes()


def draw(data: Data, path: Path, how: Callable[[Any, Data], None]) -> None:
    """Draw with `how` into a file that says what it shows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rlvr_ops", "font.size": 9}):
        figure = pyplot.figure(constrained_layout=True)
        how(figure, data)
        nothing = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Description": digest(data), **nothing})
        pyplot.close(figure)


def draw_bars(figure: Any, data: Data, label: str) -> None:
    """A panel of horizontal bars for each case."""
    panels = data["panels"]
    figure.set_size_inches(9, 0.9 + sum(0.45 + 0.21 * len(rows) for rows in panels.values()))
    heights = [2 + len(rows) for rows in panels.values()]
    for axes, (title, rows) in zip(figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0],
                                   panels.items(), strict=True):  # fmt: skip
        drawn = axes.barh([row[0] for row in rows], [row[2] for row in rows], color=[COLOURS[row[1]] for row in rows])
        axes.bar_label(drawn, [f"{row[2]:.3g}" if row[2] < 100 else f"{row[2]:.0f}" for row in rows], padding=2)
        axes.set_title(title, fontsize=9, loc="left")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(label)
    figure.suptitle(data["heading"], fontsize=10)


def draw_errors(figure: Any, data: Data) -> None:
    """A mark for each error of each system, on a logarithmic axis."""
    rows = data["rows"]
    figure.set_size_inches(9, 1.4 + 0.24 * len(rows))
    axes = figure.subplots()
    for name, mark in (("logps", "o"), ("d_hidden", "s"), ("d_weight", "^")):
        some = [row for row in rows if name in row[2]]
        axes.scatter([row[2][name] for row in some], [row[0] for row in some], marker=mark, label=name, s=30)
    axes.set_xscale("log")
    axes.set_xlabel("distance from float64: logps in nats (root mean square), gradients relative (norms)")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False)
    figure.suptitle(data["heading"], fontsize=10)


def draw_scaling(figure: Any, data: Data) -> None:
    """Time above, memory below, a column for each size that was varied, both axes logarithmic."""
    curves = data["curves"]
    figure.set_size_inches(2.6 * len(curves) + 0.6, 5)
    grid = figure.subplots(2, len(curves), squeeze=False)
    for column, (varied, curve) in enumerate(curves.items()):
        for axes, index, unit, what in ((grid[0][column], 1, 1, "time"), (grid[1][column], 2, 1e6, "memory")):
            sizes = [point[0] for point in curve["points"]]
            values = [point[index] / unit for point in curve["points"]]
            axes.loglog(sizes, values, "o-", color=COLOURS["ours"])
            axes.set_yticks(values, [f"{value:.3g}" for value in values])
            axes.set_title(f"{what} ~ {varied}^{curve['exponents'][what]:.2f}", fontsize=9)
            axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        grid[1][column].set_xlabel(varied)
    grid[0][0].set_ylabel("ms")
    grid[1][0].set_ylabel("MB above the inputs")
    figure.suptitle(data["heading"], fontsize=10)

"""Write the stored results into docs/benchmarks.md and docs/scaling.md and draw their plots, from the JSON alone.

python -m benchmarks.chart
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import scaling
from benchmarks.results import RESULTS, ROOT, Result, caption, case_of, devices, load, markdown, origin

BEGIN, END = "<!-- {}: written by python -m benchmarks.chart -->", "<!-- end -->"
COLOURS = {"ours": "#1b6ca8", "eager": "#9a9a9a", "peer": "#d9a441", "floor": "#dccfae", "products": "#3b3b3b"}
TIME, MEMORY = ("median_ms", 1.0, "median ms"), ("peak_bytes", 1e6, "peak MB above the inputs")


class Plot(NamedTuple):
    """draw(figure, stored). The file holds a digest of what it shows, so that a stale one is noticed."""

    draw: Callable[[Any, list[Result]], None]
    stored: list[Result]

    @property
    def digest(self) -> str:
        return "data " + hashlib.sha256(json.dumps(self.stored, sort_keys=True).encode()).hexdigest()[:24]

    def is_in(self, path: Path) -> bool:
        return path.exists() and self.digest.encode() in path.read_bytes()

    def save(self, path: Path) -> None:
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rlvr_ops", "font.size": 9}):
            figure = Figure(layout="constrained")
            figure.suptitle(f"{self.stored[0]['device']}, torch {self.stored[0]['versions']['torch']}", fontsize=10)
            self.draw(figure, self.stored)
            nothing = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150, metadata={"Description": self.digest, **nothing})


def bars(figure: Any, stored: list[Result]) -> None:
    """For each case a panel of times and one of memory, the smallest first."""
    panels = [(result, *measure) for measure in (TIME, MEMORY) for result in stored]
    heights = [2 + len(result["systems"]) for result, *_ in panels]
    figure.set_size_inches(9, 0.9 + 0.21 * sum(heights))
    grid = figure.subplots(len(panels), height_ratios=heights, squeeze=False).flat
    for axes, (result, key, unit, what) in zip(grid, panels, strict=True):
        rows = sorted((row for row in result["systems"] if key in row), key=lambda row: row[key])
        colours = [COLOURS[row["kind"]] for row in rows]
        drawn = axes.barh([row["system"] for row in rows], [row[key] / unit for row in rows], color=colours)
        axes.bar_label(drawn, fmt="{:,.1f}", padding=2)
        axes.set_title(f"{caption(case_of(result))}: {what}", fontsize=9, loc="left")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)


def curves(figure: Any, stored: list[Result]) -> None:
    """Time and memory against each size that was varied, with the fitted exponents."""
    exponents = {varied: stored[0]["exponents"][varied] for varied in scaling.SIZES if varied in stored[0]["exponents"]}
    figure.set_size_inches(2.6 * len(exponents) + 0.6, 5)
    grid = figure.subplots(2, len(exponents), squeeze=False)
    for column, varied in enumerate(exponents):
        points = [point for point in stored[0]["points"] if point["varied"] == varied]
        for axes, kind, (key, unit, what) in zip(grid[:, column], ("time", "memory"), (TIME, MEMORY), strict=True):
            sizes = [point[scaling.SIZES[varied]] for point in points]
            axes.loglog(sizes, [point[key] / unit for point in points], "o-", color=COLOURS["ours"])
            axes.set_title(f"{kind} ~ {varied}^{exponents[varied][kind]:.2f}", fontsize=9)
            axes.set(xlabel=varied, ylabel=what)
            axes.grid(alpha=0.3)


def every_plot(results: Path) -> dict[str, Plot]:
    """All plots by their place in docs/: cases of the suite's first shape, and sweeps. The README has the first."""
    found: dict[str, Plot] = {}
    for place in devices(results):
        if stored := load(place):
            first = case_of(stored[0])
            plain = [one for one in stored if replace(case_of(one), loss=first.loss, active=first.active) == first]
            found[f"plots/{place.name}.svg"] = Plot(bars, plain)
            found.setdefault("chart.png", Plot(bars, stored[:1]))
        if (sweeps := place / "scaling.json").exists():
            found[f"plots/{place.name}-scaling.svg"] = Plot(curves, [json.loads(sweeps.read_text())])
    return found


def generated(results: Path) -> str:
    """Every device's cases as tables, below their plot."""
    parts = []
    for place in devices(results):
        if stored := load(place):
            plot = f"![time and memory on {place.name}](plots/{place.name}.svg)"
            parts += [f"### {place.name}", origin(stored), plot, markdown(stored)]
    return "\n\n".join(parts)


def rewrite(page: str, results: Path) -> str:
    """The page with what stands between its markers written anew."""
    sections = {"results": generated(results), "predicted": scaling.predicted(), "measured": scaling.measured(results)}
    for name, text in sections.items():
        before, mark, rest = page.partition(BEGIN.format(name))
        page = f"{before}{mark}\n\n{text}\n\n{END}{rest.partition(END)[2]}" if mark else page
    return page


def main(results: Path = RESULTS, docs: Path = ROOT / "docs") -> None:
    """Write the pages and their plots, and remove the plots of what is no longer there."""
    drawn = every_plot(results)
    for stale in {*docs.glob("plots/*.svg")} - {docs / name for name in drawn}:
        stale.unlink()
    for name, plot in drawn.items():
        plot.save(docs / name)
    for page in (docs / "benchmarks.md", docs / "scaling.md"):
        page.write_text(rewrite(page.read_text(), results))


if __name__ == "__main__":
    main()

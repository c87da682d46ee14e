"""Write the results into docs/benchmarks.md and draw its plots, from the stored JSON and nothing else.

python -m benchmarks.chart
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.plots import Data, bars, draw, draw_bars, draw_errors, draw_scaling, error_data, scaling_data
from benchmarks.provenance import ROOT
from benchmarks.report import RESULTS, devices, load, markdown, provenance

DOCS = ROOT / "docs"
PAGE = DOCS / "benchmarks.md"
BEGIN, END = "<!-- results: written by python -m benchmarks.chart -->", "<!-- end of results -->"
Plot = tuple[Data, Callable[[Any, Data], None]]
TIME = functools.partial(draw_bars, label="milliseconds, median")
MEMORY = functools.partial(draw_bars, label="peak MB above the inputs, returned gradients included")


def plots(place: Path) -> dict[str, Plot]:
    """A device's plots by the name of their file."""
    found: dict[str, Plot] = {}
    stored, scaling = load(place), place / "scaling.json"
    if stored:
        found[f"plots/{place.name}-time.svg"] = (bars(stored, "median_ms", 1), TIME)
        found[f"plots/{place.name}-memory.svg"] = (bars(stored, "peak_bytes", 1e6), MEMORY)
        if (errors := error_data(stored))["rows"]:
            found[f"plots/{place.name}-error.svg"] = (errors, draw_errors)
    if scaling.exists():
        found[f"plots/{place.name}-scaling.svg"] = (scaling_data(json.loads(scaling.read_text())), draw_scaling)
    return found


def overview(results: Path) -> dict[str, Plot]:
    """The README's chart: time and memory of the first case on the first device."""
    stored = next(found for place in devices(results) if (found := load(place)))
    panels: Data = {}
    for key, unit, what in (("median_ms", 1.0, "milliseconds"), ("peak_bytes", 1e6, "peak MB above the inputs")):
        data = bars(stored, key, unit)
        title, rows = next(iter(data["panels"].items()))
        panels[f"{title}: {what}"] = rows
    return {"chart.png": (data | {"panels": panels}, functools.partial(draw_bars, label=""))}


def every_plot(results: Path) -> dict[str, Plot]:
    """All plots, by their place in docs/."""
    drawn = overview(results)
    for place in devices(results):
        drawn |= plots(place)
    return drawn


def section(place: Path) -> str:
    """A device's part of the page."""
    stored, lines = load(place), [f"### {place.name}"]
    if stored:
        lines.append(provenance(stored))
    for name in plots(place):
        lines.append(f"![{Path(name).stem.rpartition('-')[2]} on {place.name}]({name})")
    return "\n\n".join([*lines, markdown(stored)] if stored else lines)


def generated(results: Path) -> str:
    """What stands between the markers in docs/benchmarks.md."""
    return "\n\n".join([BEGIN, *(section(place) for place in devices(results)), END])


def rewrite(page: str, results: Path) -> str:
    """The page with its results replaced."""
    before, rest = page.split(BEGIN)
    return before + generated(results) + rest.split(END)[1]


def main(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write the page and its plots, and remove the plots of what is no longer there."""
    drawn = every_plot(results)
    for stale in {*page.parent.glob("plots/*.svg")} - {page.parent / name for name in drawn}:
        stale.unlink()
    for name, (data, how) in drawn.items():
        draw(data, page.parent / name, how)
    page.write_text(rewrite(page.read_text(), results))


if __name__ == "__main__":
    main()

"""`python -m experiments.report`: every table and plot of docs/reproduction.md from the kept results alone."""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ace import results
from experiments.analysis import OUTCOMES, Array, Difference, Results, compare, counts, holm, pairs, pass_rates
from experiments.plan import ARMS, LONGER, ON_SMOLLM2, ON_TINY, Cell, cells
from experiments.steady import SETTINGS
from experiments.theorem import RESULT as THEOREM

PAGE = Path(__file__).parents[1] / "docs" / "reproduction.md"
PLOTS = PAGE.parent / "reproduction"
BEGIN, END = "<!-- {}: written by python -m experiments.report -->", "<!-- end -->"
FAMILIES = {
    "ACE and its controls": [
        ("ace-grpo", "grpo"), ("ace-dapo", "dapo"),
        *(("ace-grpo", arm) for arm in ("constant", "shuffled", "low-rate", "kl", "entropy")),
    ],
    "Other losses": [(arm, "grpo") for arm in ("nsr", "w-reinforce", "arm", "lens", "pass@k")],
    "What ACE hangs on": [
        *((arm, "ace-grpo") for arm in ("ace-0.5", "ace-2", "ace-4", "ace-relu", "ace-sum", "ace-moving")),
        ("ace-twice", "grpo-twice"), ("ace-twice-old", "ace-twice"),
    ],
    "Weight without selection": [("constant", "grpo"), ("shuffled", "grpo")],
}  # fmt: skip
MAIN = ["grpo", "ace-grpo", "constant", "shuffled", "dapo", "ace-dapo"]
OTHERS = ["grpo", "ace-grpo", "low-rate", "kl", "entropy", "nsr", "w-reinforce", "arm", "lens", "pass@k"]
ALPHAS = {0.0: "grpo", 0.5: "ace-0.5", 1.0: "ace-grpo", 2.0: "ace-2", 4.0: "ace-4"}
ENDS = {
    "right": "distinct_right", "answers": "distinct", "entropy": "entropy", "overconfident": "overconfident",
    "their c": "overconfidence", "c if right": "shift_right",
}  # fmt: skip
"""Columns of the table of both ends, and the outcomes that they show."""
KS = [1, 2, 4, 8, 16, 32, 64]
Row = tuple[str, str, str, Difference, float]


def of(found: Results, task: str, arm: str) -> list[dict[str, Any]]:
    """The results of an arm on a task, by seed."""
    return [found[cell] for cell in sorted(found, key=lambda c: c.seed) if (cell.task, cell.arm) == (task, arm)]


def curve(runs: Sequence[dict[str, Any]], k: int) -> Array:
    """(evaluations,) Pass@k along training, the mean over runs."""
    return np.mean([pass_rates(counts(run), 64, k).mean(-1) for run in runs], 0)


def along(runs: Sequence[dict[str, Any]], key: str) -> Array:
    """(evaluations,) another outcome along training, the mean over runs that have it."""
    return np.array(
        [
            np.mean([v for v in values if v is not None] or [np.nan])
            for values in zip(*([row[key] for row in run["rows"]] for run in runs), strict=True)
        ]
    )


def alike(found: Results, task: str, arms: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Of each arm that has been run on a task, the results of the seeds that all of them have."""
    seeds = {arm: {c.seed for c in found if (c.task, c.arm) == (task, arm)} for arm in arms}
    run = [arm for arm in arms if seeds[arm]]
    common = sorted(set.intersection(*(seeds[arm] for arm in run))) if run else []
    return {arm: [found[Cell(task, arm, seed)] for seed in common] for arm in run if common}


def ends(found: Results, tasks: Sequence[str]) -> str:
    """A table of both ends of training, a row for each task and arm."""
    rows = []
    for task in tasks:
        if runs := of(found, task, "grpo"):
            rows.append([task, "*initial*", *_end(runs, 0), ""])
        rows += [[task, f"`{arm}`", *_end(runs, -1), _tokens(runs)] for arm in ARMS if (runs := of(found, task, arm))]
    return _table(["task", "arm", "seeds", "Pass@1", "Pass@64", *ENDS, "tokens"], rows)


def _end(runs: Sequence[dict[str, Any]], at: int) -> list[str]:
    """How many seeds, their pass rates and other outcomes at an evaluation."""
    return [str(len(runs)), *_rates(runs, at), *(_number(along(runs, key)[at]) for key in ENDS.values())]


def _tokens(runs: Sequence[dict[str, Any]]) -> str:
    """Thousands that a run learned from."""
    return f"{np.mean([learned_from(run) for run in runs]) / 1e3:.0f}"


def learned_from(run: dict[str, Any]) -> float:
    """Sampled tokens that a run learned from."""
    return float(sum(row["training"]["num_tokens"] for row in run["rows"][1:]))


def _rates(runs: Sequence[dict[str, Any]], at: int) -> list[str]:
    """Pass@1 and Pass@64 with their standard deviations over seeds."""
    found = []
    for k in (1, 64):
        values = [float(pass_rates(counts(run), 64, k).mean(-1)[at]) for run in runs]
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        found.append(f"{np.mean(values):.3f}{spread}")
    return found


def compared(found: Results, asked: Sequence[tuple[str, str]], on: Sequence[str]) -> list[Row]:
    """Each comparison of a family: both arms, the outcome, the difference, its p by Holm's method."""
    rows = []
    for one, other in asked:
        tasks = [both for task in on if len((both := pairs(found, task, one, other)).one[0])]
        if tasks:
            differences = compare(tasks, family=len(asked) * len(OUTCOMES))
            rows += [(one, other, outcome, difference) for outcome, difference in differences.items()]
    corrected = holm([1.0 if np.isnan(row[3].p) else row[3].p for row in rows])
    return [(*row, p) for row, p in zip(rows, corrected, strict=True)]


def comparisons(rows: Iterable[Row]) -> str:
    """A family as a table."""
    head = [
        "difference", "outcome", "mean", "95 %", "95 % for the family", "the same, given the problems", "p by Holm", "pairs",
    ]  # fmt: skip
    return _table(head, [
        [f"`{one}` − `{other}`", outcome, _signed(d.mean), *map(_interval, (d.interval, d.corrected, d.given_problems)),
         "" if np.isnan(d.p) else f"{p:.4f}", str(d.said) if d.said == d.pairs else f"{d.said} of {d.pairs}"]
        for one, other, outcome, d, p in rows
    ])  # fmt: skip


def by_task(found: Results) -> str:
    """The differences of the first family on each task alone, described and not tested."""
    rows = []
    for one, other in FAMILIES["ACE and its controls"]:
        for task in ON_TINY:
            both = pairs(found, task, one, other)
            if len(both.one[0]):
                each = compare([both], family=1)
                shown = [f"{_signed(d.mean)} {_interval(d.interval)}" for d in each.values()]
                rows.append([f"`{one}` − `{other}`", task, *shown, str(len(both.one[0]))])
    return _table(["difference", "task", *OUTCOMES, "seeds"], rows)


def weights(found: Results) -> str:
    """By how much ACE multiplied the advantages of wrong rollouts: the mean over training, and that of the batches' largest."""
    arms = [arm for arm, one in ARMS.items() if one.settings[0].startswith("algorithm.name=ace")]
    tasks = [*ON_TINY, *ON_SMOLLM2]
    rows = ([f"`{arm}`", *(_weight(of(found, task, arm)) for task in tasks)] for arm in arms)
    return _table(["arm", *tasks], (row for row in rows if any(row[1:])))


def _weight(runs: Sequence[dict[str, Any]]) -> str:
    updates = [n for run in runs for n in np.diff(steps(run))]
    rows = [row["training"] for run in runs for row in run["rows"][1:]]
    keys = "ace/weight/mean", "ace/weight/max"
    return ", ".join(f"{np.average([row[key] for row in rows], weights=updates):.2f}" for key in keys) if rows else ""


def spent(found: Results) -> str:
    """What was computed, and where."""
    seconds = sum(row["seconds"] for row in found.values())
    tokens = sum(learned_from(row) for row in found.values())
    machines = {json.dumps(row["machine"], sort_keys=True): row["machine"] for row in found.values()}
    where = "; ".join(", ".join(f"{key} {value}" for key, value in one.items()) for one in machines.values())
    return (
        f"{len(found)} of {len(cells())} runs, {seconds / 3600:.1f} hours of one core (and what was repeated after a kill),"
        f" {tokens / 1e6:.1f} million sampled tokens learned from. On: {where}."
    )


def trade(axes: Sequence[Any], found: Results, arms: Sequence[str]) -> None:
    """Pass@64 against Pass@1 along training, a panel a task."""
    for axis, task in zip(axes, ON_TINY, strict=True):
        for arm, runs in alike(found, task, arms).items():
            axis.plot(curve(runs, 1), curve(runs, 64), marker=".", markersize=4, linewidth=1, label=arm)
        axis.set(title=task, xlabel="Pass@1", ylabel="Pass@64")


def pass_at_k(axes: Sequence[Any], found: Results) -> None:
    """Pass@k against k after the last update."""
    for axis, task in zip(axes, ON_TINY, strict=True):
        chosen = alike(found, task, MAIN)
        for arm, runs in chosen.items():
            axis.plot(KS, [curve(runs, k)[-1] for k in KS], marker=".", linewidth=1, label=arm)
        if "grpo" in chosen:
            axis.plot(KS, [curve(chosen["grpo"], k)[0] for k in KS], color="grey", linestyle=":", label="initial")
        axis.set_xscale("log", base=2)
        axis.set(title=task, xlabel="k", ylabel="Pass@k")


def errors(axes: Sequence[Any], found: Results) -> None:
    """Overconfident errors and entropy along training, the mean of the tasks."""
    labels = {
        "overconfident": "share of wrong answers with c > 0.05",
        "overconfidence": "their mean c",
        "entropy": "entropy of an answer, nats",
    }
    tasks = [alike(found, task, MAIN) for task in ON_TINY]
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for arm in MAIN:
            runs = [chosen[arm] for chosen in tasks if arm in chosen]
            if len(runs) == len(ON_TINY):
                axis.plot(steps(runs[0][0]), np.mean([along(each, key) for each in runs], 0), linewidth=1, label=arm)
        axis.set(title=label, xlabel="update")


def steps(run: dict[str, Any]) -> list[int]:
    """After how many updates a run was evaluated."""
    return [row["step"] for row in run["rows"]]


def forest(axes: Sequence[Any], rows: Sequence[Row]) -> None:
    """Differences of a family with both intervals, a panel an outcome."""
    for axis, outcome in zip(axes, OUTCOMES, strict=True):
        chosen = [(one, other, d) for one, other, name, d, _ in rows if name == outcome]
        for y, (_, _, d) in enumerate(chosen):
            axis.plot(d.corrected, [y, y], color="#9ab8d4", linewidth=1)
            axis.plot(d.interval, [y, y], color="#1b6ca8", linewidth=3)
            axis.plot(d.mean, y, "o", color="black", markersize=4)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(title=outcome, yticks=range(len(chosen)), yticklabels=[f"{one} − {other}" for one, other, _ in chosen])
        axis.invert_yaxis()


def doses(axes: Sequence[Any], found: Results) -> None:
    """Pass@1 and Pass@64 after the last update against alpha."""
    for axis, k in zip(axes, (1, 64), strict=True):
        for task in ON_TINY:
            runs = alike(found, task, list(ALPHAS.values()))
            if len(runs) == len(ALPHAS):
                ends_ = [curve(runs[arm], k)[-1] for arm in ALPHAS.values()]
                axis.plot(list(ALPHAS), ends_, marker="o", linewidth=1, label=task)
        axis.set(xlabel="alpha", title=f"Pass@{k} after the last update")


def longer(axes: Sequence[Any], found: Results) -> None:
    """Pass@1 and Pass@64 of the runs of three times as many updates: along training, and the one against the other."""
    for arm, runs in alike(found, LONGER, ["grpo", "ace-grpo"]).items():
        first, last = (curve(runs, k) for k in (1, 64))
        for axis, x, y in zip(axes, (steps(runs[0]), steps(runs[0]), first), (first, last, last), strict=True):
            axis.plot(x, y, marker=".", markersize=4, linewidth=1, label=arm)
    for axis, names in zip(axes, (("update", "Pass@1"), ("update", "Pass@64"), ("Pass@1", "Pass@64")), strict=True):
        axis.set(xlabel=names[0], ylabel=names[1])


def theorem(axes: Sequence[Any]) -> None:
    """The residual over the selective regulariser's gradient, and the overconfident errors, along the enumerable run."""
    stored = json.loads(THEOREM.read_text())
    labels = {
        "ratio": "|residual| / |gradient of R|",
        "cosine": "cosine of ACE's part and descent on R",
        "overconfident": "share of wrong answers with c > 0",
    }
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for name, rows in stored.items():
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], linewidth=1, label=name)
        axis.set(title=label, xlabel="update")


def steady(axes: Sequence[Any]) -> None:
    """Resident memory and seconds of each step of the long runs."""
    for model, color in zip(SETTINGS, ("#1b6ca8", "#d9a441"), strict=True):
        if not (path := THEOREM.parent / f"steady-{model}.json").is_file():
            continue
        stored = json.loads(path.read_text())
        share = np.linspace(0, 1, len(stored["megabytes"]))
        middle = [np.array(stored[key]) / np.median(stored[key]) for key in ("megabytes", "seconds")]
        for axis, values in zip(axes, middle, strict=True):
            axis.plot(share, values, linewidth=0.8, color=color, label=f"{model}, {len(values)} updates")
    axes[0].set(title="resident memory / median", xlabel="share of the run", ylim=(0.9, 1.1))
    axes[1].set(title="seconds of a step / median", xlabel="share of the run", ylim=(0, 3))


def save(name: str, draw: Callable[[Any], None], columns: int, height: float = 3.4) -> None:
    """A row of panels as SVG, the same bytes from the same results."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rlvr_ops", "font.size": 8}):
        figure = Figure(figsize=(3.6 * columns, height), layout="constrained")
        axes = figure.subplots(1, columns)
        draw(axes)
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        if axes[-1].get_legend_handles_labels()[1]:
            axes[-1].legend(fontsize=7)
        PLOTS.mkdir(parents=True, exist_ok=True)
        figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None, "Creator": None})


def _signed(value: float) -> str:
    return "" if np.isnan(value) else f"{value:+.3f}"


def _interval(ends: tuple[float, float]) -> str:
    return "" if np.isnan(ends[0]) else "any" if np.isinf(ends[0]) else f"[{ends[0]:+.3f}, {ends[1]:+.3f}]"


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Write the page's tables and draw its plots."""
    found = results()
    families = {name: compared(found, asked, ON_TINY) for name, asked in FAMILIES.items()}
    sections = {
        "spent": spent(found),
        "ends": ends(found, ON_TINY),
        "by task": by_task(found),
        "weights": weights(found),
    }
    for name, tasks in {"smollm2": ON_SMOLLM2, "longer": [LONGER]}.items():
        sections |= {
            f"{name} ends": ends(found, tasks),
            name: comparisons(compared(found, [("ace-grpo", "grpo")], tasks)),
        }
    sections |= {name: comparisons(rows) for name, rows in families.items()}
    page = PAGE.read_text()
    for name, text in sections.items():
        before, mark, rest = page.partition(BEGIN.format(name))
        page = f"{before}{mark}\n\n{text}\n\n{END}{rest.partition(END)[2]}" if mark else page
    PAGE.write_text(page)
    save("trade", lambda axes: trade(axes, found, MAIN), len(ON_TINY))
    save("trade-others", lambda axes: trade(axes, found, OTHERS), len(ON_TINY))
    save("pass-at-k", lambda axes: pass_at_k(axes, found), len(ON_TINY))
    save("errors", lambda axes: errors(axes, found), 3)
    save("alpha", lambda axes: doses(axes, found), 2)
    save("longer", lambda axes: longer(axes, found), 3)
    save("theorem", theorem, 3)
    save("steady", steady, 2)
    for name, rows in families.items():
        height = 1 + 0.3 * len(FAMILIES[name])
        save(name.lower().replace(" ", "-"), partial(forest, rows=rows), len(OUTCOMES), height)


if __name__ == "__main__":
    main()

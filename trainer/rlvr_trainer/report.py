"""`summary.json` and `report.png`: what a run did, in one sentence and in five curves."""

import json
from pathlib import Path
from typing import Any

from rlvr_trainer.config import Config
from rlvr_trainer.console import EVALUATIONS, METRICS, RunLog, read_jsonl
from rlvr_trainer.evaluation import Evaluation, compare, powers_of_two
from rlvr_trainer.parsing import ConfigError

CURVES = [
    ("reward", "reward (training)"),
    ("entropy", "entropy (nats per token)"),
    ("kl", "KL to the reference (nats per token)"),
    ("ace/frac_overconfident", "overconfident share of wrong rollouts"),
]


def summarise(run: Path, config: Config, log: RunLog, step: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Compare the first and the last evaluation, say so, and write `summary.json` and `report.png`."""
    before, after = (_evaluation(log.evaluations[i]) for i in (0, -1))
    summary = {
        "model": config.policy.name,
        "task": config.task.name,
        "algorithm": config.algorithm.name,
        "seed": config.run.seed,
        "steps": step,
        **compare(before, after),
        "before": before.metrics(),
        "after": after.metrics(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    picture = plot(run)
    log.say(f"report: {picture}, model: {run / 'model'}")
    log.say(summary["sentence"])
    return summary


def plot(run: Path) -> Path:
    """Draw `report.png` from a run's metrics and evaluations.

    Raises:
        ConfigError: the folder holds no metrics.
    """
    if not (run / METRICS).is_file():
        raise ConfigError(f"nothing to plot: {run} holds no {METRICS}")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_jsonl(run / METRICS)
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (name, label) in zip(axes.flat, CURVES, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), marker=".") if points else axis.text(0.3, 0.5, "not recorded")
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
    _pass_at_k(axes.flat[4], read_jsonl(run / EVALUATIONS) if (run / EVALUATIONS).is_file() else [])
    _sentence(axes.flat[5], run)
    path = run / "report.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _pass_at_k(axis: Any, evaluations: list[dict[str, Any]]) -> None:
    chosen = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else evaluations
    for name, row in zip(("before", "after"), chosen, strict=False):
        found = _evaluation(row)
        ks = powers_of_two(found.samples)
        means, lows, highs = zip(*(found.pass_at(k) for k in ks), strict=True)
        axis.plot(ks, means, marker="o", label=f"{name} (step {row['step']})")
        axis.fill_between(ks, lows, highs, alpha=0.2)
    axis.set(title="held-out Pass@k, 95 % interval over problems", xlabel="k", ylim=(0, 1))
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.3)
    if chosen:
        axis.legend()


def _sentence(axis: Any, run: Path) -> None:
    axis.axis("off")
    if (run / "summary.json").is_file():
        summary = json.loads((run / "summary.json").read_text())
        head = f"{summary['model']}, {summary['task']}\n{summary['algorithm']}, seed {summary['seed']}"
        axis.text(0.0, 0.9, f"{head}\n\n{summary['sentence']}", wrap=True, va="top", fontsize=11)


def _evaluation(row: dict[str, Any]) -> Evaluation:
    return Evaluation(**{key: value for key, value in row.items() if key != "step"})

"""`summary.json` and `report.png`: what a run did, in one sentence and in six plots."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import rlvr_ops
from rlvr_trainer.checkpoints import folder_of
from rlvr_trainer.config import Config
from rlvr_trainer.console import EVALUATIONS, METRICS, RunLog, read_jsonl
from rlvr_trainer.evaluation import RELIABILITY_BINS, Evaluation, compare, powers_of_two
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.writing import write_text, writing

CURVES = [
    ("reward", "reward (training)"),
    ("entropy", "entropy (nats per token)"),
    ("kl", "KL to the reference (nats per token)"),
    ("ace/frac_overconfident", "overconfident share of wrong rollouts"),
]


def summarise(
    run: Path,
    config: Config,
    log: RunLog,
    step: int,
    seconds: dict[str, float],
    best: tuple[int, float] | None = None,
) -> dict[str, Any]:
    """Compare the first and the last evaluation, say so, and write `summary.json` and `report.png`.

    `best` is the step and the Pass@1 of the checkpoint that was kept for it.
    """
    before, after = (_evaluation(log.evaluations[i]) for i in (0, -1))
    summary = {
        "model": config.policy.name,
        "task": config.task.title,
        "algorithm": config.algorithm.title(),
        "seed": config.run.seed,
        "steps": step,
        **compare(before, after),
        **({"best": {"step": best[0], "pass@1": best[1], "checkpoint": str(folder_of(run, best[0]))}} if best else {}),
        "before": before.metrics(),
        "after": after.metrics(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    if step == 0:
        summary["sentence"] = "No step was taken: there is nothing to compare the first evaluation with."
    write_text(run / "summary.json", json.dumps(summary, indent=2) + "\n")
    picture = plot(run)
    log.say(f"report: {picture}, model: {run / 'model'}")
    if best:
        log.say(f"best held-out pass@1: {best[1]:.3f} at step {best[0]}, kept in {folder_of(run, best[0])}")
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
    figure, axes = plt.subplot_mosaic("abcd\nefgg", figsize=(17, 7), layout="constrained")
    for axis, (name, label) in zip((axes[letter] for letter in "abcd"), CURVES, strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), marker=".") if points else axis.text(0.3, 0.5, "not recorded")
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
    evaluations = read_jsonl(run / EVALUATIONS) if (run / EVALUATIONS).is_file() else []
    chosen = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else evaluations
    _pass_at_k(axes["e"], chosen)
    _reliability(axes["f"], chosen)
    _sentence(axes["g"], run)
    path = run / "report.png"
    with writing(path):
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _pass_at_k(axis: Any, chosen: list[dict[str, Any]]) -> None:
    for name, row in zip(("before", "after"), chosen, strict=False):
        found = _evaluation(row)
        if not found.per_problem(1):
            continue
        ks = powers_of_two(found.samples)
        means, lows, highs = zip(*(found.pass_at(k) for k in ks), strict=True)
        axis.plot(ks, means, marker="o", label=f"{name} (step {row['step']})")
        axis.fill_between(ks, lows, highs, alpha=0.2)
    axis.set(title="held-out Pass@k, 95 % interval over problems", xlabel="k", ylim=(0, 1))
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:
        axis.legend()


def _reliability(axis: Any, chosen: list[dict[str, Any]]) -> None:
    """Accuracy against confidence, a point per bin that is not empty; its area is the bin's share of the answers."""
    axis.plot((0, 1), (0, 1), color="grey", linestyle=":")
    title = "held-out reliability"
    for name, row in zip(("before", "after"), chosen, strict=False):
        found = _evaluation(row)
        judged = found.judged()
        if judged is None:
            continue
        counts, confidence, accuracy = rlvr_ops.reliability_bins(*judged, bins=RELIABILITY_BINS)
        filled = counts > 0
        (line,) = axis.plot(confidence[filled], accuracy[filled], label=f"{name} (step {row['step']})")
        axis.scatter(
            confidence[filled], accuracy[filled], s=300 * counts[filled] / counts.sum(), color=line.get_color()
        )
        values = found.calibration()
        auroc = f"{values['eval/auroc']:.2f}" if "eval/auroc" in values else "undefined"
        title = f"reliability {name}\nECE {values['eval/ece']:.3f}, Brier {values['eval/brier']:.3f}, AUROC {auroc}"
    if axis.get_legend_handles_labels()[1]:
        axis.legend()
    else:
        axis.text(0.3, 0.5, "not recorded")
    axis.set(title=title, xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axis.grid(alpha=0.3)


def _sentence(axis: Any, run: Path) -> None:
    axis.axis("off")
    if (run / "summary.json").is_file():
        summary = json.loads((run / "summary.json").read_text())
        head = f"{summary['model']}, {summary['task']}\n{summary['algorithm']}, seed {summary['seed']}"
        axis.text(0.0, 0.9, f"{head}\n\n{summary['sentence']}", wrap=True, va="top", fontsize=11)


def _evaluation(row: dict[str, Any]) -> Evaluation:
    known = {field.name for field in fields(Evaluation)}
    return Evaluation(**{"reasons": {}, **{key: value for key, value in row.items() if key in known}})

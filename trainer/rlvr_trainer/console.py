"""What a run says and writes: one line per step, a table of completions now and then, and JSON Lines of everything."""

import json
from pathlib import Path
from typing import Any, TextIO

from rlvr_trainer.rollouts import Batch

METRICS, COMPLETIONS, EVALUATIONS = "metrics.jsonl", "completions.jsonl", "evaluations.jsonl"


class RunLog:
    """The files and lines of one run. Resuming at step n first drops what was logged from n on."""

    def __init__(self, run: Path, first_step: int = 0, quiet: bool = False) -> None:
        self.quiet = quiet
        run.mkdir(parents=True, exist_ok=True)
        self._metrics = _continue(run / METRICS, first_step)
        self._completions = _continue(run / COMPLETIONS, first_step)
        self._evaluations = _continue(run / EVALUATIONS, first_step)
        self.evaluations = read_jsonl(run / EVALUATIONS)

    def say(self, text: str) -> None:
        """A line for people: no colours, no bars, nothing is overwritten."""
        if not self.quiet:
            print(text, flush=True)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """A row of `metrics.jsonl`."""
        _write(self._metrics, {"step": step, **values})

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """A row of `evaluations.jsonl`: the correct answers of every held-out problem."""
        self.evaluations.append({"step": step, **values})
        _write(self._evaluations, self.evaluations[-1])

    def completions(self, step: int, batch: Batch) -> None:
        """Every rollout of the step, a row each in `completions.jsonl`."""
        for row in completion_rows(batch):
            _write(self._completions, {"step": step, **row})

    def progress(self, step: int, steps: int, values: dict[str, float]) -> None:
        """The one line of a step."""
        shown = [
            ("reward", "reward", ".3f"),
            ("loss", "loss", "+.4f"),
            ("kl", "kl", ".4f"),
            ("entropy", "entropy", ".2f"),
        ]
        parts = [f"{label} {values[name]:{form}}" for label, name, form in shown if name in values]
        speed = f"{values['perf/tokens_per_second']:.0f} tokens/s, {values['perf/seconds_step']:.1f} s"
        self.say(f"step {step:>{len(str(steps))}}/{steps}  " + "  ".join([*parts, speed]))

    def table(self, batch: Batch, rows: int = 6, width: int = 60) -> None:
        """Some completions of the step, the first of each group, with reward and advantage."""
        every = completion_rows(batch)
        groups = max(len({row["prompt"] for row in every}), 1)
        chosen = every[:: max(len(every) // groups, 1)][:rows]
        self.say(f"  {'reward':>6}  {'advantage':>9}  {'prompt':<{width // 2}}  completion")
        for row in chosen:
            prompt = _one_line(row["prompt"])[-width // 2 :]
            text = _one_line(row["completion"])[:width]
            self.say(f"  {row['reward']:6.2f}  {row['advantage']:+9.2f}  {prompt:<{width // 2}}  {text}")

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._completions.close()
        self._evaluations.close()


def completion_rows(batch: Batch) -> list[dict[str, Any]]:
    """Prompt, answer, completion, reward, advantage and length of every rollout."""
    rollouts = batch.rollouts
    lengths = rollouts.lengths().tolist()
    together = zip(
        rollouts.problems, rollouts.texts, batch.rewards.tolist(), batch.advantages.tolist(), lengths, strict=True
    )
    return [
        {"prompt": p.text, "answer": p.answer, "completion": t, "reward": r, "advantage": a, "length": n}
        for p, t, r, a, n in together
    ]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _continue(path: Path, first_step: int) -> TextIO:
    kept = []
    if first_step > 0 and path.exists():
        with open(path, encoding="utf-8") as file:
            kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= first_step]
    file = open(path, "w", encoding="utf-8")  # noqa: SIM115  closed by RunLog.close
    file.writelines(kept)
    file.flush()
    return file


def _write(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def _one_line(text: str) -> str:
    return " ".join(text.split())

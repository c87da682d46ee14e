"""ACE-GRPO with each backend, by the command that people type: they sample other texts, and learn alike."""

import json
import os
import subprocess
import sys

import pytest
from served import Served

COMMAND = [sys.executable, "-m", "rlvr_trainer", "train"]
TINY = ["demo-tiny", "run.steps=30", "evaluation.samples=8", "run.table_every=0"]
SMOLLM2 = [
    "demo-smollm2-135m",
    "policy.precision=full",
    "rollout.prompts=3",
    "rollout.group_size=4",
    "rollout.max_new_tokens=12",
    "optim.micro_batch=12",
    "task.held_out=12",
    "evaluation.samples=1",
    "run.table_every=0",
]
"""The demo with a fifth of its rollouts, in ten steps."""


def train(settings, backend, out, *more):
    """Run the trainer; its summary and the metrics of its steps."""
    memory = ["rollout.memory_share=0.05"] if backend == "vllm" else []
    arguments = [*settings, f"rollout.backend={backend}", *memory, *more, "--out", str(out)]
    subprocess.run([*COMMAND, *arguments], check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads((out / "summary.json").read_text()), [row for row in rows if "loss" in row]


def train_with_each(settings, folder, model):
    """Summary and steps by backend. `model` is what all but the first learn and the server serves."""
    found = {"transformers": train(settings, "transformers", folder / "transformers")}
    settings = [*settings, f"policy.name={model}"]
    found["vllm"] = train(settings, "vllm", folder / "vllm")
    server = Served(model, folder / "log")
    try:
        servers = f"rollout.servers=[{server.wait().url}]"
        found["vllm-server"] = train(settings, "vllm-server", folder / "server", servers)
    finally:
        server.stop()
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["tiny", "smollm2-135m"])
def test_with_every_backend_the_policy_learns_alike(name, tmp_path):
    """Before, after, and how far the engine was from the policy meanwhile."""
    settings, model = {
        "tiny": (TINY, tmp_path / "transformers" / "initial_policy"),
        "smollm2-135m": (SMOLLM2, "smollm2-135m"),
    }[name]
    found = train_with_each(settings, tmp_path, model)
    rewards = {backend: sum(row["reward"] for row in rows[-5:]) / 5 for backend, (_, rows) in found.items()}
    for backend, (summary, rows) in found.items():
        assert summary["difference"] > (0.04 if name == "tiny" else 0.3), backend
        assert abs(rewards[backend] - rewards["transformers"]) < (0.15 if name == "tiny" else 0.4)
        assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in rows)
        assert all(row["sampling/frac_without_logp"] == 0 for row in rows)
        assert all(row["sampling/policy_lag"] == 0 for row in rows)

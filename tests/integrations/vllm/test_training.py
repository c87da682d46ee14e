"""ACE-GRPO with each backend, by the command that people type: they sample other texts, and learn alike."""

import json
import os
import subprocess
import sys

import pytest
from served import Served, serving

COMMAND = [sys.executable, "-m", "rlvr_trainer", "train"]
BACKENDS = ("transformers", "vllm", "vllm-server")
TINY = ["demo-tiny", "run.steps=40", "optim.learning_rate=1e-3", "run.table_every=0"]
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


def all_learn(settings, folder, model, *options):
    """Train with each of the three; `model` gives what the server serves."""
    found = {}
    for backend in BACKENDS[:2]:
        found[backend] = train(settings, backend, folder / backend)
    with serving(Served(model(folder), folder / "log", *options)) as (server,):
        servers = f"rollout.servers=[{server.url}]"
        found["vllm-server"] = train(settings, "vllm-server", folder / "vllm-server", servers)
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["tiny", "smollm2-135m"])
def test_with_every_backend_the_policy_learns_alike(name, tmp_path):
    """Before, after, and how far the engine was from the policy meanwhile."""
    settings, model = {
        "tiny": (TINY, lambda folder: folder / "vllm"),
        "smollm2-135m": (SMOLLM2, lambda folder: "smollm2-135m"),
    }[name]
    found = all_learn(settings, tmp_path, model)
    after = {backend: summary["pass@1_after"] for backend, (summary, _) in found.items()}
    rewards = {backend: sum(row["reward"] for row in rows[-5:]) / 5 for backend, (_, rows) in found.items()}
    print(after, rewards)
    for backend, (summary, rows) in found.items():
        assert summary["difference"] > 0.05, backend
        assert abs(rewards[backend] - rewards["transformers"]) < 0.35
        assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in rows)
        assert all(row["sampling/frac_without_logp"] == 0 for row in rows)
        assert all(row["sampling/policy_lag"] == 0 for row in rows)

"""Tokens a second, seconds to start and to push weights, and memory of the trainer's samplers, one process each.

    python -m benchmarks.samplers --model tiny smollm2-135m --backend transformers vllm [--servers http://127.0.0.1:8000]

Needs what the backends need (`make test-vllm` sets an environment up). 64 completions of up to 24 tokens.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

PROMPTS, SAMPLES, LENGTH, REPEATS = 8, 8, 24, 3


def main() -> None:
    """Print a JSON line for each model, backend and precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["tiny", "smollm2-135m"])
    parser.add_argument("--backend", nargs="+", default=["transformers", "vllm"])
    parser.add_argument("--precision", nargs="+", default=["full", "mixed"])
    parser.add_argument("--servers", nargs="*", default=[])
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for model in given.model:
        for backend in given.backend:
            for precision in given.precision:
                if given.alone:
                    print(json.dumps(measure(model, backend, precision, given.servers)), flush=True)
                    continue
                choice = ["--model", model, "--backend", backend, "--precision", precision, "--servers", *given.servers]
                subprocess.run([sys.executable, "-m", "benchmarks.samplers", "--alone", *choice], check=True)


def measure(model: str, backend: str, precision: str, servers: list[str]) -> dict[str, Any]:
    """Start a sampler, push the policy's weights and sample, each several times."""
    import psutil
    import torch
    from rlvr_trainer.config import load
    from rlvr_trainer.policies import load_policy
    from rlvr_trainer.sampling import Sampling
    from rlvr_trainer.tasks import make_task

    asked = [f"rollout.servers={json.dumps(servers)}"] if backend == "vllm-server" else []
    settings = [f"policy.name={model}", f"policy.precision={precision}", f"rollout.backend={backend}", *asked]
    config = load(
        None, [*settings, "rollout.memory_share=0.05", "policy.warm_start_steps=20", f"task.held_out={PROMPTS}"]
    )
    task = make_task(config.task)
    policy = load_policy(config, task)
    before = psutil.Process().memory_info().rss
    start, _ = seconds(lambda: policy.start_sampler(config))
    ids = policy.tokenizer(policy.texts([problem.prompt for problem in task.held_out])).input_ids
    pushes = [seconds(policy.refresh_sampler)[0] for _ in range(REPEATS)]
    speeds = []
    for seed in range(REPEATS + 1):
        policy.refresh_sampler()  # nothing is in a prefix cache
        spent, found = seconds(lambda: policy.sampler.sample(ids, Sampling(LENGTH, n=SAMPLES, seed=64 * seed)))  # noqa: B023
        speeds.append(sum(len(one.token_ids) for one in found) / spent)
    rss = psutil.Process().memory_info().rss
    policy.close()
    task.close()
    return {
        "model": model,
        "backend": backend,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "seconds_start": round(start, 2),
        "seconds_push": round(statistics.median(pushes), 4),
        "tokens_per_second": round(statistics.median(speeds[1:])),
        "tokens": sum(len(one.token_ids) for one in found),
        "memory_added_mb": round((rss - before) / 2**20),
    }


def seconds(work: Any) -> tuple[float, Any]:
    """How long it took, and what it gave."""
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


if __name__ == "__main__":
    main()

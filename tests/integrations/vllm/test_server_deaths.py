"""Servers that are killed: the trainer says so and saves, and nothing is left of them. The last to ask for `two_servers`."""

import json
import os
import signal
import subprocess
import threading
import time

import pytest
import torch
from rlvr_trainer.sampling import SamplerError, Sampling
from rlvr_trainer.sampling.processes import members
from rlvr_trainer.sampling.shared_memory import PREFIX, SHARED_MEMORY
from rlvr_trainer.sampling.vllm_server import ServerSampler
from safetensors.torch import load_file
from served import COMMAND, Served
from transformers import AutoModelForCausalLM

RUN = [
    "policy.precision=full",
    "policy.device=cpu",
    "task.parameters={min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}",
    "task.held_out=4",
    "task.verifier_processes=1",
    "rollout.backend=vllm-server",
    "rollout.prompts=4",
    "rollout.group_size=4",
    "rollout.max_new_tokens=150",
    "algorithm.overlong_fraction=0.95",  # shorter is better: something to learn for a policy that knows nothing
    "optim.learning_rate=1e-3",
    "evaluation.samples=1",
    "run.steps=12",
    "run.threads=1",
]


def _until(met, seconds=20):
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _remains(server):
    """What must be gone soon after it was killed."""
    return server.sessions(), server.shared_memory()


def _gone(server, remains):
    """Wait for `rlvr-ops serve` to end, and for all that it started; its exit code."""
    sessions, shared = remains
    code = server.process.wait(30)
    _until(lambda: not any(map(members, sessions)) and not any(path.exists() for path in shared))
    return code


def _start(*arguments):
    return subprocess.Popen([*COMMAND, "train", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _weights(run):
    return load_file(run / "model" / "model.safetensors")


def test_a_run_whose_server_is_killed_saves_and_goes_on_with_another_to_the_same_weights(
    two_servers, tiny_folder, tmp_path
):
    server, other = two_servers
    settings = [*RUN, f"policy.name={tiny_folder}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = _start(*settings, f"rollout.servers=[{other.url}]", f"run.out={whole}")
    run = _start(*settings, f"rollout.servers=[{server.url}]", f"run.out={killed}")
    remains, pid = _remains(server), server.processes()["api_server"]
    assert len(remains[1]) == 2  # vLLM's queues
    _until(lambda: _steps(killed) >= 2, 60)
    os.kill(pid, signal.SIGKILL)
    assert _gone(server, remains) == 1
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert f"rlvr-ops: the server at {server.url} does not answer any more (connection refused)" in errors
    assert "Traceback" not in errors
    assert not list(SHARED_MEMORY.glob(f"{PREFIX}{run.pid}-*"))
    assert f"rlvr-ops train --resume {killed}" in output

    assert undisturbed.wait(120) == 0, undisturbed.stderr.read()
    resumed = _start("--resume", str(killed), f"rollout.servers=[{other.url}]")
    assert resumed.wait(120) == 0, resumed.stderr.read()
    found, expected = _weights(killed), _weights(whole)
    assert not torch.equal(expected["lm_head.weight"], load_file(tiny_folder / "model.safetensors")["lm_head.weight"])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)


def _steps(run):
    metrics = run / "metrics.jsonl"
    rows = metrics.read_text().splitlines() if metrics.exists() else []
    return sum("loss" in json.loads(row) for row in rows)


@pytest.mark.parametrize("victim", ["Worker", "EngineCore"])
def test_a_server_that_loses_a_part_in_mid_stream_ends_and_is_named(
    victim, two_servers, tiny_folder, tokenizer, tmp_path
):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    server, prompt = two_servers[1], [*range(5, 25)]
    if victim == "EngineCore":
        server = Served(tiny_folder, tmp_path / "log").wait()
    sampler = ServerSampler([server.url], model, tokenizer, [2], dtype=torch.float32, patience=60)
    remains = _remains(server)
    threading.Timer(0.5, os.kill, (server.processes()[victim], signal.SIGKILL)).start()
    began = time.monotonic()
    with pytest.raises(SamplerError, match=f"^the server at {server.url} .*$"):
        sampler.sample([prompt] * 100, Sampling(200, n=4))
    assert time.monotonic() - began < 30
    assert _gone(server, remains) == 1
    assert str(prompt)[1:-1] not in server.log.read_text()


def test_nothing_is_left_of_a_server_whose_parent_is_killed_while_it_starts(tiny_folder, tmp_path):
    server = Served(tiny_folder, tmp_path / "log")
    try:
        _until(lambda: "EngineCore" in server.processes(), 60)
    except BaseException:
        server.stop()
        raise
    remains = _remains(server)
    server.process.kill()
    assert _gone(server, remains) == -signal.SIGKILL

"""FSDP2 over two processes (gloo) against one: the head's weight is sharded, and its gradient reduced, by FSDP's own hooks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import two_ranks

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def sharded(models, tmp_path_factory):
    """What each of two processes found in each case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    file, paths = str(tmp_path_factory.mktemp("ranks") / "rank"), [models(**case[0]) for case in two_ranks.CASES]
    command = [sys.executable, str(HERE / "two_ranks.py"), file, *paths]
    world = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_PORT": port,
        "VERL_ENGINE_VENDOR": "rlvr_ops",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [subprocess.Popen(command, env=world | {"RANK": str(rank)}) for rank in (0, 1)]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    return [torch.load(f"{file}{rank}") for rank in (0, 1)]


@pytest.mark.parametrize("case", range(len(two_ranks.CASES)), ids=lambda i: "-".join(map(str, two_ranks.CASES[i])))
def test_two_processes_take_the_step_of_one(sharded, models, monkeypatch, case):
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "rlvr_ops")
    config, remove_padding, _ = two_ranks.CASES[case]
    name, logps, loss, gradients = two_ranks.step(models(**config), remove_padding, -1)
    both = [rank[0][case] for rank in sharded]
    assert [found[0] for found in both] == [name, name] == ["HeadEngine", "HeadEngine"]
    torch.testing.assert_close(torch.cat([found[1] for found in both]), logps, rtol=1e-5, atol=1e-5)
    for found in both:
        assert found[2] == pytest.approx(loss, abs=1e-5)
        assert found[3].keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[3][key], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_the_head_gets_the_same_gradient_under_fsdp1(sharded, models, tie):
    model, logps, _ = tiny.plain_scores(models(tie_word_embeddings=tie), tiny.batch())
    (logps.sum() / 2).backward()  # two processes are averaged
    for rank in sharded:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(rank[1][tie][name], parameter.grad, rtol=1e-5, atol=1e-5)

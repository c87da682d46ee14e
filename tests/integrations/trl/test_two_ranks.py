"""On two processes the fused loss is TRL's: it is in the model's forward, so the hooks of DDP and FSDP2 run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module", params=["untied", "tied"])
def found(request, folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("two-ranks") / "found"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, SCRIPT, folders(request.param), out], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def test_updates_under_ddp(found):
    fused, unfused = found["fused"], found["unfused"]
    assert fused["kind"] == unfused["kind"] == "DistributedDataParallel"
    for name, weight in unfused["weights"].items():
        torch.testing.assert_close(fused["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    for ours, theirs in zip(fused["logs"], unfused["logs"], strict=True):
        for name in ("loss", "grad_norm", "kl", "ace/shift/mean", "ace/weight/max", "clip_ratio/region_mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def test_gradients_under_fsdp2(found):
    for kind in ("root", "apart"):
        for name, gradient in found["expected"].items() if kind in found else ():
            ours = found[kind][name]
            torch.testing.assert_close(
                ours, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max(), msg=f"{kind} {name}"
            )

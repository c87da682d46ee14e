"""DDP and FSDP2 on two processes: the loss in a sharded module's forward has the gradient of the whole batch."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXACT = ("ddp", "ddp_static", "fsdp_root", "fsdp_resharded", "fsdp_tied", "fsdp_head", "fsdp_compiled")

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="the two processes talk by gloo")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What two processes printed: rank, way of distributing, schedule, error."""
    store = tmp_path_factory.mktemp("ranks") / "store"
    path = os.pathsep.join(map(str, (HERE, ROOT, ROOT / "kernels", ROOT / "trainer")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    commands = [
        [sys.executable, "-W", "ignore", str(HERE / "two_ranks.py"), str(rank), str(store)] for rank in range(2)
    ]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=200) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, outputs, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [line.split(maxsplit=2) for output, _ in outputs for line in output.splitlines()]


def errors(lines, way):
    found = [rest.split() for _rank, name, rest in lines if name == way]
    assert len(found) == 4  # two ranks, two schedules
    each = [float(error) for _schedule, error in found]
    assert all(map(math.isfinite, each))  # max would pass over a NaN
    return each


@pytest.mark.parametrize("way", EXACT)
def test_the_gradient_is_that_of_the_whole_batch(lines, way):
    assert max(errors(lines, way)) < 1e-12


def test_mixed_precision_gives_it_to_bfloat16(lines):
    assert max(errors(lines, "fsdp_bf16")) < 0.1


def test_a_head_that_nothing_has_gathered_is_refused_with_the_way_out(lines):
    refusals = [rest for _rank, name, rest in lines if name == "refused"]
    assert len(refusals) == 2
    for refusal in refusals:
        assert refusal.startswith(
            "lm_head_weight must be a whole tensor, got a sharded DTensor: call the loss in the forward"
        )
        assert "full_tensor() does not add up the ranks' gradients" in refusal

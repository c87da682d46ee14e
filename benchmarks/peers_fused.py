"""Peers that compute the loss themselves, and the floors: cross entropies that give out one number and no log-probabilities."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch.nn.functional import pad

from benchmarks.cases import Batch, Case
from benchmarks.entrants import Outputs, Run, need_cuda
from benchmarks.peers import torch_chunked


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 matmuls may round their operands to TF32; set back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def liger_grpo(case: Case) -> Run:
    """Liger's fused GRPO, whose matmuls are float32: exact."""
    return _liger_grpo(allow_tf32=False)


def liger_grpo_tf32(case: Case) -> Run:
    """The same with float32 matmuls in TF32."""
    need_cuda()
    return _liger_grpo(allow_tf32=True)


def _liger_grpo(*, allow_tf32: bool) -> Run:
    fused_loss: Any = import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    # On a GPU it compiles by default; on a CPU that would time the C++ compiler's code, which is not how it is used.
    fused = fused_loss(beta=0.0, use_ref_model=False, loss_type="grpo", compiled=torch.cuda.is_available())

    def run(batch: Batch) -> Outputs:
        mask = torch.ones_like(batch.ids)
        with tf32(allow_tf32):  # the matmuls of its backward are in its forward
            out = fused(batch.hidden, batch.weight, batch.ids, mask, batch.advantages, old_per_token_logps=batch.old)
        return Outputs(out[0])

    return run


def liger_triton_grpo(case: Case) -> Run:
    """Liger's Triton loss over full logits, of which it wants one row more than there are tokens."""
    need_cuda()
    function: Any = import_module("liger_kernel.transformers.grpo_loss").triton_grpo_loss

    def run(batch: Batch) -> Outputs:
        logits = pad(batch.hidden, (0, 0, 0, 1)) @ batch.weight.T
        loss, _metrics = function(
            logits, batch.old, None, batch.ids, batch.advantages,
            temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.2, loss_type="grpo", reduce=True,
        )  # fmt: skip
        return Outputs(loss)

    return run


def torch_cross_entropy_floor(case: Case) -> Run:
    """PyTorch's chunked linear cross entropy, mean over all rows."""
    function, options = torch_chunked(case)

    def run(batch: Batch) -> Outputs:
        return Outputs(function(batch.hidden.flatten(0, 1), batch.weight, batch.ids.flatten(), options=options))

    return run


def quack_floor(case: Case) -> Run:
    """QuACK's chunked linear cross entropy, mean over all rows."""
    need_cuda()
    function: Any = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def run(batch: Batch) -> Outputs:
        return Outputs(function(batch.hidden.flatten(0, 1), batch.weight, batch.ids.flatten(), reduction="mean"))

    return run

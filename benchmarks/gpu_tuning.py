"""The sizes that the library has chosen from counts: each beside its neighbours, on one shape of a language model.

The workspace of the single pass and of two passes, and the block and the warps of each kernel. What is fastest here is what
the constant should be; docs/performance-log.md then says by how much.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from rlvr_kernels import dlogits, fused_policy, lse_fold, weigh

import rlvr_ops
from benchmarks.cases import Batch, Case
from benchmarks.gpu_stage import Stage, stage
from benchmarks.measure import interleave, spread
from benchmarks.on_gpu import write

CASE = Case("ace", 8192, 4096, 131072, 16, "bfloat16")
TINY = Case("ace", 16, 8, 50, 4)
MIB = 1 << 20


@contextmanager
def replaced(module: ModuleType, **values: int) -> Iterator[None]:
    """A module's constants changed for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def step(batch: Batch, schedule: str, workspace_bytes: int | None) -> None:
    """Forward and backward of ACE-GRPO, on policy."""
    hidden, weight = batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_()
    out = rlvr_ops.ace_loss(
        hidden, weight, batch.ids, batch.advantages, ref_per_token_logps=batch.ref, schedule=schedule,
        workspace_bytes=workspace_bytes,
    )  # fmt: skip
    out.loss.backward()


def choices(batch: Batch, case: Case) -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """What to vary, and the step under it."""
    row = case.vocabulary * 6  # a logit in float32 and its gradient in bf16
    for schedule, rows in itertools.product(("single_pass", "two_pass"), (512, 1024, 2048, 4096, 8192)):
        room = rows * row
        yield {"what": schedule, "workspace_mib": room // MIB}, lambda s=schedule, r=room: step(batch, s, r)  # type: ignore[misc]
    for module, schedule in ((fused_policy, "single_pass"), (lse_fold, "two_pass"), (dlogits, "two_pass")):
        for block, warps in itertools.product((2048, 4096, 8192), (4, 8, 16)):

            def varied(m: ModuleType = module, s: str = schedule, b: int = block, w: int = warps) -> None:
                with replaced(m, BLOCK=b, NUM_WARPS=w):
                    step(batch, s, None)

            yield {"what": module.__name__.rpartition(".")[2], "block": block, "warps": warps}, varied
    for block, warps in itertools.product((512, 1024, 2048), (4, 8)):

        def weighed(b: int = block, w: int = warps) -> None:
            with replaced(weigh, BLOCK=b, NUM_WARPS=w):
                rlvr_ops.ace_loss_from_logps(
                    batch.ref, batch.advantages, ref_per_token_logps=batch.ref, old_per_token_logps=batch.old
                )

        yield {"what": "weigh", "block": block, "warps": warps}, weighed


def main() -> None:
    """Measure until the time is up."""
    here, rows = stage(), []
    case = TINY if here.tiny else CASE
    batch = case.batch(here.device)
    for what, action in choices(batch, case):
        if here.over():
            break
        rows.append(what | {"ms": timed(action, here)})
        write(here.out / "tuning.json", rows)


def timed(action: Callable[[], None], here: Stage) -> float | str:
    """Median milliseconds, or why there are none."""
    try:
        action()
        least = 1 if here.tiny else 10
        return round(spread(interleave([action], here.device, seconds=0.5, least=least, most=30)[0])["median_ms"], 3)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    finally:
        if here.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

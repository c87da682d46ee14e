"""What the library has chosen without measuring, each beside its neighbours: a label, and the step under it."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from rlvr_kernels import dlogits, fused_policy, linear_lse, lse_fold, single_pass, tile, weigh
from rlvr_kernels.linear_lse_tiling import CANDIDATES, Tiling
from rlvr_kernels.tile import bytes_per_logit

import rlvr_ops
from benchmarks.cases import Batch, Case
from rlvr_ops import ops

MIB = 1 << 20
Choice = tuple[dict[str, Any], Callable[[], object]]


def loss_step(batch: Batch, schedule: str, workspace_bytes: int | None = None, *, on_policy: bool = False) -> object:
    """Forward and backward of ACE-GRPO; on policy it goes through fused_policy."""
    hidden, weight = batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_()
    out = rlvr_ops.ace_loss(
        hidden, weight, batch.ids, batch.advantages, ref_per_token_logps=batch.ref,
        old_per_token_logps=None if on_policy else batch.old, schedule=schedule, workspace_bytes=workspace_bytes,
    )  # fmt: skip
    return torch.autograd.grad(out.loss, (hidden, weight))


def under(patches: list[Any], step: Callable[[], object]) -> object:
    """The step while `patches` hold."""
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        return step()


def fused_or_separate(batch: Batch, case: Case) -> Iterator[Choice]:
    """fused_policy's one launch against lse_fold, weigh and dlogits one after the other."""

    def separate(step: Any, logits: Any, rows: Any, chunk: Any, shift: Any) -> Any:
        return step._separate(logits, rows, chunk)

    whole = partial(loss_step, batch, "single_pass", on_policy=True)
    yield {"what": "fused_policy, one launch"}, whole
    patch = mock.patch.object(single_pass._Step, "_fused", separate)
    yield {"what": "fused_policy, three launches"}, partial(under, [patch], whole)


def compaction(batch: Batch, case: Case) -> Iterator[Choice]:
    """A third of the tokens clipped: their rows leave the tile before the last two products, or are multiplied."""
    third = torch.arange(batch.old.shape[1], device=batch.old.device) % 3 == 0
    clipped = batch._replace(old=batch.old - 2 * third * batch.advantages.sign()[:, None])
    step = partial(loss_step, clipped, "single_pass")
    for moves in (True, False):
        patch = mock.patch.object(single_pass, "moving_pays", lambda *_, moves=moves: moves)
        yield {"what": "a third clipped", "moved": moves}, partial(under, [patch], step)


def dtypes(batch: Batch, case: Case) -> Iterator[Choice]:
    """The tile in float32, as where products can widen, and in the operands' dtype: half the bytes, and rounded logits."""
    for schedule in ("single_pass", "two_pass"):
        step = partial(loss_step, batch, schedule)
        yield {"what": "tile in float32", "schedule": schedule}, step
        patches = [mock.patch.object(module, "logit_dtype", lambda device, dtype: dtype) for module in (tile, ops)]
        yield {"what": "tile in the operands' dtype", "schedule": schedule}, partial(under, patches, step)


def tilings(batch: Batch, case: Case) -> Iterator[Choice]:
    """linear_lse as it is tiled, as it could be on this GPU, and with tiles that any GPU takes."""
    step = partial(linear_lse.linear_lse, batch.hidden.flatten(0, 1), batch.weight, batch.ids.flatten())
    yield {"what": "linear_lse as chosen"}, step
    if batch.hidden.device.type != "cuda":
        return
    for group in (4, 16):
        yield (
            {"what": "linear_lse", "GROUP": group},
            partial(under, [mock.patch.object(linear_lse, "GROUP", group)], step),
        )
    known = CANDIDATES.get(("cuda", 10 * torch.cuda.get_device_capability()[0]), ())
    tiles = itertools.product(((128, 256), (128, 128), (64, 256)), (32, 64), (4, 8), (3, 4))
    plain = (Tiling(rows, cols, inner, warps, stages) for (rows, cols), inner, warps, stages in tiles)
    for other in (*known, *plain):
        patch = mock.patch.object(linear_lse, "tiling", lambda *_, other=other: other)
        yield {"what": "linear_lse", "tiling": _unlike(other)}, partial(under, [patch], step)


def _unlike(tiling: Tiling) -> str:
    """A tiling without what it leaves as it is by default."""
    shown = {field.name: getattr(tiling, field.name) for field in fields(tiling)}
    plain = {field.name: field.default for field in fields(tiling)}
    return " ".join(f"{name}={value}" for name, value in shown.items() if value != plain[name])


def workspaces(batch: Batch, case: Case) -> Iterator[Choice]:
    """Both schedules with room for so many rows of logits."""
    for schedule, rows in itertools.product(("single_pass", "two_pass"), (512, 1024, 2048, 4096, 8192)):
        room = rows * case.vocabulary * bytes_per_logit(batch.weight.device, batch.weight.dtype)
        label = {"what": schedule, "rows": rows, "workspace_mib": room // MIB}
        yield label, partial(loss_step, batch, schedule, room)


def blocks(batch: Batch, case: Case) -> Iterator[Choice]:
    """Block and warps of each kernel that goes over a row."""
    modules: tuple[tuple[ModuleType, str], ...] = (
        (fused_policy, "single_pass"), (lse_fold, "two_pass"), (dlogits, "two_pass")
    )  # fmt: skip
    for (module, schedule), block, warps in itertools.product(modules, (2048, 4096, 8192), (4, 8, 16)):
        patch = mock.patch.multiple(module, BLOCK=block, NUM_WARPS=warps)
        label = {"what": module.__name__.rpartition(".")[2], "block": block, "warps": warps} | _chosen(
            module, block, warps
        )
        yield label, partial(under, [patch], partial(loss_step, batch, schedule, on_policy=module is fused_policy))
    for block, warps in itertools.product((512, 1024, 2048), (4, 8)):
        patch = mock.patch.multiple(weigh, BLOCK=block, NUM_WARPS=warps)
        weighed = partial(
            rlvr_ops.ace_loss_from_logps, batch.ref, batch.advantages, ref_per_token_logps=batch.ref,
            old_per_token_logps=batch.old,
        )  # fmt: skip
        label = {"what": "weigh", "block": block, "warps": warps} | _chosen(weigh, block, warps)
        yield label, partial(under, [patch], weighed)


def _chosen(module: ModuleType, block: int, warps: int) -> dict[str, Any]:
    return {"as": "chosen"} if (block, warps) == (module.BLOCK, module.NUM_WARPS) else {}


GROUPS = (fused_or_separate, dtypes, compaction, tilings, workspaces, blocks)

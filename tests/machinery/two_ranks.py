"""Run by test_two_ranks.py, once per rank: prints how far each way of distributing is from the policy on one process."""

import sys
from copy import deepcopy

import torch
import torch.distributed as dist
from machinery_cases import make_batch, make_policy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rlvr_ops

RANKS, ROLLOUTS = 2, 4


def ddp(policy, mesh):
    return DistributedDataParallel(policy)


def ddp_static(policy, mesh):
    return DistributedDataParallel(policy, static_graph=True)


def fsdp_root(policy, mesh):
    return fully_shard(policy, mesh=mesh)


def fsdp_resharded(policy, mesh):
    fully_shard(policy.block, mesh=mesh)
    return fully_shard(policy, mesh=mesh, reshard_after_forward=True)


def fsdp_compiled(policy, mesh):
    return torch.compile(fully_shard(policy, mesh=mesh, reshard_after_forward=True), backend="aot_eager")


def fsdp_bf16(policy, mesh):
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fully_shard(policy, mesh=mesh, mp_policy=precision)


def fsdp_tied(policy, mesh):
    return fully_shard(policy, mesh=mesh, reshard_after_forward=True)


def fsdp_head(policy, mesh):
    """The lm_head is a group of its own, so the loss is computed in its forward."""
    head = policy.lm_head
    head.forward = lambda hidden, ids, advantages, **given: (
        rlvr_ops.ace_loss(hidden, head.weight, ids, advantages, **policy.loss, **given).loss
    )
    fully_shard(head, mesh=mesh, reshard_after_forward=True)
    policy.forward = lambda ids, advantages, **given: head(policy.hidden_states(ids), ids, advantages, **given)
    return fully_shard(policy, mesh=mesh)


def fsdp_head_outside(policy, mesh):
    """The same group, and the loss in the policy's forward, where nothing has gathered the head."""
    fully_shard(policy.lm_head, mesh=mesh)
    return fully_shard(policy, mesh=mesh)


def gradients(policy):
    found = {name.removeprefix("module."): x.grad for name, x in policy.named_parameters()}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}


def error(distribute, schedule, mesh):
    """The largest difference of a gradient, relative to its largest entry; raise if one is not finite."""
    policy = make_policy(schedule=schedule, beta=0.1)
    if distribute is fsdp_tied:
        policy.lm_head.weight = policy.embedding.weight
    one = deepcopy(policy)
    batch = make_batch(ROLLOUTS)
    one(num_items_in_batch=ROLLOUTS, **batch).backward()
    share = ROLLOUTS // RANKS
    mine = {name: x[dist.get_rank() * share :][:share] for name, x in batch.items()}
    # FSDP and DDP average over the ranks, so each divides by its share of the whole batch.
    model = distribute(policy, mesh)
    model(num_items_in_batch=ROLLOUTS / RANKS, **mine).backward()
    found, truth = gradients(policy), gradients(one)
    for name, gradient in found.items():
        assert bool(gradient.isfinite().all()), f"{distribute.__name__} {schedule}: {name} is not finite"
    return max(float((found[name] - x).abs().max() / x.abs().max()) for name, x in truth.items())


def main(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for distribute in (ddp, ddp_static, fsdp_root, fsdp_resharded, fsdp_tied, fsdp_head, fsdp_compiled, fsdp_bf16):
        for schedule in ("single_pass", "two_pass"):
            print(rank, distribute.__name__, schedule, error(distribute, schedule, mesh), flush=True)
    try:
        error(fsdp_head_outside, "auto", mesh)
    except TypeError as refusal:
        print(rank, "refused", refusal, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

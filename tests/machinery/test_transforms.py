"""torch.func is refused by name; first derivatives of torch.autograd.functional and torch.export work."""

import pytest
import torch
from machinery_cases import make_batch, make_policy

import rlvr_ops

HIDDEN, WEIGHT = torch.randn(4, 8, 16), torch.randn(61, 16)
BATCH = make_batch(dtype=torch.float32)
IDS, ADVANTAGES = BATCH.pop("ids"), BATCH.pop("advantages")
FUNCTIONS = {
    "loss": lambda hidden: rlvr_ops.ace_loss(hidden, WEIGHT, IDS, ADVANTAGES, **BATCH).loss,
    "token_logps": lambda hidden: rlvr_ops.token_logps(hidden, WEIGHT, IDS).logps.sum(),
    "from logps": lambda hidden: rlvr_ops.ace_loss_from_logps(-hidden[..., 0].abs(), ADVANTAGES, **BATCH).loss,
    "a function of the user's": lambda hidden: (
        rlvr_ops.ace_loss(
            hidden, WEIGHT, IDS, ADVANTAGES, surrogate=lambda logps, rows: -logps * rows.advantages, **BATCH
        ).loss
    ),
}
TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f)(HIDDEN),
    "vjp": lambda f: torch.func.vjp(f, HIDDEN),
    "vmap": lambda f: torch.vmap(f)(HIDDEN.expand(2, *HIDDEN.shape)),
    "jacrev": lambda f: torch.func.jacrev(f)(HIDDEN),
    "functionalize": lambda f: torch.func.functionalize(f)(HIDDEN),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_torch_func_is_refused_with_the_way_out(transform, function):
    with pytest.raises(NotImplementedError, match=r"do not run inside torch\.func .*: use backward or torch\.autograd"):
        TRANSFORMS[transform](FUNCTIONS[function])


def test_per_rollout_gradients_by_vmap_of_advantages_are_refused_too():
    with pytest.raises(NotImplementedError, match="and a loop for vmap"):
        torch.vmap(lambda a: rlvr_ops.ace_loss(HIDDEN, WEIGHT, IDS, a, **BATCH).loss)(ADVANTAGES.expand(2, -1))


def test_after_a_refused_transform_the_loss_runs_as_before():
    before = FUNCTIONS["loss"](HIDDEN)
    with pytest.raises(NotImplementedError):
        torch.func.grad(FUNCTIONS["loss"])(HIDDEN)
    assert torch.equal(FUNCTIONS["loss"](HIDDEN), before)


def test_autograd_functional_takes_first_derivatives():
    leaf = HIDDEN.clone().requires_grad_()
    (truth,) = torch.autograd.grad(FUNCTIONS["loss"](leaf), leaf)
    assert torch.equal(torch.autograd.functional.jacobian(FUNCTIONS["loss"], HIDDEN), truth)
    _, vjp = torch.autograd.functional.vjp(FUNCTIONS["loss"], HIDDEN)
    assert torch.equal(vjp, truth)


def test_a_policy_with_its_loss_exports():
    policy = make_policy(torch.float32)
    batch = make_batch(dtype=torch.float32)
    exported = torch.export.export(policy, (), batch)
    assert any("rlvr_ops" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(**batch), policy(**batch))

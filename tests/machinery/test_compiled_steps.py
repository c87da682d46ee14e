"""torch.compile of whole training steps: one graph, the numbers of eager, and no recompilation as the batch changes."""

import inspect
import shutil

import pytest
import torch
from machinery_cases import make_batch, make_policy

import rlvr_ops

SHAPES = [(4, 8), (5, 9), (3, 30), (8, 7)]
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


def changed(batch, **others):
    """The batch with arguments replaced; None drops one."""
    return {name: value for name, value in {**batch, **others}.items() if value is not None}


def descend(parameters, gradients, rate=0.1):
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(rate * gradient)


def assert_equal_policies(a, b):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("packed", "schedule"), [(False, "single_pass"), (True, "two_pass")])
def test_forward_backward_and_update_are_one_graph_with_the_numbers_of_eager(packed, schedule):
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch does not trace torch.autograd.grad")

    def step(policy, **batch):
        loss = policy(**batch)
        parameters = list(policy.parameters())
        descend(parameters, torch.autograd.grad(loss, parameters))
        return loss.detach()

    policy, eager = (make_policy(beta=0.1, schedule=schedule) for _ in range(2))
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for seed in range(2):
            batch = make_batch(packed=packed, seed=seed)
            torch.testing.assert_close(compiled(policy, **batch), step(eager, **batch), rtol=1e-12, atol=1e-14)
    assert_equal_policies(policy, eager)


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_inductor_gives_the_numbers_of_eager_through_the_optimizer():
    policy, eager = (make_policy(beta=0.1, entropy_coef=0.01) for _ in range(2))
    ours, theirs = (torch.optim.SGD(p.parameters(), lr=0.1, momentum=0.9) for p in (policy, eager))
    compiled = torch.compile(policy, fullgraph=True)
    update = torch.compile(ours.step)  # PyTorch itself breaks the graph at the head of every optimizer's step
    for seed in range(2):
        batch = make_batch(seed=seed)
        for model, optimizer, step in ((compiled, ours, update), (eager, theirs, theirs.step)):
            optimizer.zero_grad()
            model(**batch).backward()
            step()
    assert_equal_policies(policy, eager)


def scheduled(i):
    """Hyper-parameters that a schedule moves at every step."""
    return {
        "alpha": 1 / (i + 1), "beta": 0.01 * (i + 1), "epsilon_low": 0.2 + 0.01 * i, "epsilon_high": 0.3 + 0.01 * i,
        "delta": 2.0 + 0.1 * i, "entropy_coef": 0.01 * (i + 1), "temperature": 1 + 0.1 * i, "loss_type": "dapo",
    }  # fmt: skip


CASES = {
    "as it is": lambda i: {},
    "on policy, without a mask": lambda i: {"old_per_token_logps": None, "completion_mask": None},
    "without a reference, two passes, a count as a tensor": lambda i: {
        "ref_per_token_logps": None, "alpha": 0.0, "schedule": "two_pass", "num_items_in_batch": torch.tensor(4 + i),
    },
    "scheduled numbers": lambda i: {**scheduled(i), "num_items_in_batch": 40.5 + i},
}  # fmt: skip


@layouts
@pytest.mark.parametrize("case", CASES)
def test_new_lengths_rollouts_active_rows_and_numbers_do_not_recompile(packed, case):
    policy = make_policy()
    policy.block = torch.nn.Identity()  # attention takes longer to compile than the loss, and is not ours
    by_default = case == "as it is"
    compiled = torch.compile(policy, fullgraph=True, backend="aot_eager", dynamic=None if by_default else True)
    for i, (rollouts, length) in enumerate(SHAPES):
        batch = changed(make_batch(rollouts, length, packed=packed, seed=i), **CASES[case](i))
        batch["advantages"][: i % 3] = 0  # these rollouts are not scored
        # By default the first call compiles for its own shapes, and the second makes symbols of what differs.
        with torch._dynamo.config.patch(error_on_recompile=i > by_default):
            loss = compiled(**batch)
            loss.backward()
        torch.testing.assert_close(loss, policy(**batch), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("number", "value", "other"), [("beta", 0.1, 0.0), ("delta", 3.0, None), ("entropy_coef", 0.1, 0.0)]
)
def test_a_number_that_becomes_0_or_none_compiles_once_more_and_no_other_does(number, value, other):
    policy, batch = make_policy(), make_batch()
    policy.block = torch.nn.Identity()
    compiled = torch.compile(policy, fullgraph=True, backend="aot_eager", dynamic=True)

    def step(x, **config):
        with torch._dynamo.config.patch(**config):
            found = compiled(**batch, **{number: x})
        torch.testing.assert_close(found, policy(**batch, **{number: x}), rtol=1e-12, atol=1e-14)

    step(value)
    step(1.1 * value, error_on_recompile=True)
    with pytest.raises(torch._dynamo.exc.RecompileError):
        step(other, error_on_recompile=True)
    step(other)
    for x in (other, 1.2 * value):
        step(x, error_on_recompile=True)


def test_a_scoring_pass_does_not_recompile_as_lengths_change():
    policy = make_policy()

    def score(ids, mask):
        with torch.no_grad():
            states = policy.hidden_states(ids)
            return rlvr_ops.token_logps(states, policy.lm_head.weight, ids, completion_mask=mask, with_entropy=True)

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    for i, (rollouts, length) in enumerate(SHAPES):
        batch = make_batch(rollouts, length, seed=i)
        inputs = batch["ids"], batch["completion_mask"]
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            found = compiled(*inputs)
        for ours, truth in zip(found[:2], score(*inputs)[:2], strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)


LOSSES = {name: getattr(rlvr_ops, name) for name in rlvr_ops.__all__ if name.endswith("_loss")}
NAMED = [name for name, loss in LOSSES.items() if "advantages" in inspect.signature(loss).parameters]


@pytest.mark.parametrize("name", NAMED)
def test_every_named_loss_compiles_whole(name):
    loss, policy, batch = LOSSES[name], make_policy(), make_batch()
    known = inspect.signature(loss).parameters
    given = {
        key: batch[key] for key in ("ref_per_token_logps", "old_per_token_logps", "completion_mask") if key in known
    }
    states, weight = policy.hidden_states(batch["ids"]).detach(), policy.lm_head.weight
    arguments = (states, weight, batch["ids"], batch["advantages"])
    compiled = torch.compile(lambda *tensors: loss(*tensors, **given).loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), loss(*arguments, **given).loss, rtol=1e-12, atol=1e-14)

"""What public bug reports of this field did to the losses, each with the right value."""

import inspect
import pickle
from dataclasses import fields, is_dataclass

import pytest
import torch
from loss_cases import SMALL, assert_same, dense_batch, make_batch, policy_loss, policy_loss_from_logps

import rlvr_ops
from rlvr_ops import KL, Ace, Clip, Head, Objective, Plan, Rollouts
from rlvr_ops.reference import reference_policy_loss

B, T, H, V = 4, 6, 8, 50
SCHEDULES = ("single_pass", "two_pass")


# Sums over long rollouts


def long_logps(tokens):
    g = torch.Generator().manual_seed(0)
    old = -0.2 - torch.rand(2, tokens, generator=g)
    return old + 3e-5 + 1e-6 * torch.randn(2, tokens, generator=g), old, torch.tensor([1.0, -1.0])


def packed(tokens):
    return {"cu_seqlens": torch.arange(3) * tokens}


@pytest.mark.parametrize("tokens", [2048, 131_072, 1_000_000])
@pytest.mark.parametrize(
    "kind", ["gspo", "gspo packed", "gmpo packed", "ace packed", "function packed", "sequence weights"]
)
def test_a_long_rollout_is_weighed_as_in_float64(tokens, kind):
    logp, old, advantages = long_logps(tokens)

    def gradient(dtype):
        x, y = logp.to(dtype), old.to(dtype)
        given = {"old_per_token_logps": y}
        if "padded" not in kind and kind != "gspo":
            x, given = x.flatten(), {"old_per_token_logps": y.flatten(), **packed(tokens)}
        leaf = x.requires_grad_()
        if kind.startswith("gspo"):
            given |= {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}
        elif kind.startswith("gmpo"):
            given["surrogate"] = "gmpo"
        elif kind.startswith("ace"):
            given |= {"alpha": 1.0, "ref_per_token_logps": given["old_per_token_logps"] - 0.1}
        elif kind.startswith("function"):
            given["surrogate"] = lambda p, rows: (
                -rows.advantages * rows.rollout_mean(p - rows.old_per_token_logps).exp()
            )
        else:
            sampling = (old - 1.0 / tokens).to(dtype).flatten()
            given |= {"sampling_per_token_logps": sampling, "sampling_correction": "sequence_truncate"}
        out = policy_loss_from_logps(leaf, advantages.to(dtype), **given)
        return out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]

    (loss, grad), (true_loss, truth) = gradient(torch.float32), gradient(torch.float64)
    # The inputs' own rounding is in both: the float64 run starts from the float32 numbers.
    assert (grad.double() - truth).norm() <= 1e-5 * truth.norm()
    assert abs(loss.double() - true_loss) <= 1e-5


@pytest.mark.interpret
def test_the_kernel_sums_a_rollouts_slopes_as_in_float64():
    tokens = 1_000_000
    logp, old, _ = (x[:1] for x in long_logps(tokens))

    def gradient(dtype, backend):
        leaf = logp.to(dtype).requires_grad_()
        given = {"old_per_token_logps": old.to(dtype), "epsilon_low": 3e-4, "epsilon_high": 4e-4, "backend": backend}
        return torch.autograd.grad(rlvr_ops.gspo_loss_from_logps(leaf, torch.ones(1, dtype=dtype), **given).loss, leaf)[
            0
        ]

    found, truth = gradient(torch.float32, "triton"), gradient(torch.float64, "torch")
    assert (found.double() - truth).norm() <= 2e-6 * truth.norm()


# Weights that overflow


@pytest.mark.parametrize("kind", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("surrogate", ["ppo_clip", "gmpo"])
def test_an_advantage_of_zero_contributes_zero_however_large_its_weight(kind, surrogate):
    old = torch.stack([torch.zeros(10_000), torch.full((10_000,), 0.01 if kind.startswith("seq") else 100.0)])
    logp = old.clone().requires_grad_()
    out = policy_loss_from_logps(
        logp, torch.tensor([1.0, 0.0]), old_per_token_logps=old, sampling_per_token_logps=torch.zeros(2, 10_000),
        sampling_correction=kind, sampling_clip_max=None, surrogate=surrogate,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert out.loss.item() == pytest.approx(-0.5, rel=1e-5)
    assert bool(grad.isfinite().all())
    assert not bool(grad[1].any())


def test_chunks_of_one_long_rollout_add_up_in_float64():
    g = torch.Generator().manual_seed(0)
    tokens, vocabulary = 40_000, 16
    hidden, weight = torch.randn(1, tokens, 4, generator=g), torch.randn(vocabulary, 4, generator=g)
    ids, advantages = torch.randint(vocabulary, (1, tokens), generator=g), torch.tensor([1.0])

    def loss(dtype, **options):
        old = torch.full((1, tokens), -2.0, dtype=dtype)
        given = hidden.to(dtype), weight.to(dtype).requires_grad_(), ids, advantages.to(dtype)
        return rlvr_ops.ace_loss(*given, alpha=0.0, old_per_token_logps=old, loss_type="luspo", **options).loss.double()

    found = loss(torch.float32, schedule="single_pass", workspace_bytes=vocabulary * 4 * 4)
    torch.testing.assert_close(found, loss(torch.float64), rtol=2e-7, atol=0)


@pytest.mark.parametrize("old", ["none", "equal", "near"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
def test_a_token_of_advantage_zero_has_no_gradient_in_gmpo(old, backend):
    logp = torch.full((1, 2), -1.0, requires_grad=True)
    given = {} if old == "none" else {"old_per_token_logps": logp.detach() + (1e-6 if old == "near" else 0)}
    out = rlvr_ops.gmpo_loss_from_logps(logp, torch.tensor([[1.0, 0.0]]), backend=backend, **given)
    out.loss.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-0.25, 0.0]]))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
def test_a_drift_that_is_no_number_keeps_its_rollout(backend):
    inf = float("inf")
    logp = torch.tensor([[-1.0, -inf, -1.0], [-1.0, -1.0, -1.0]])
    old = torch.tensor([[-inf, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    out = policy_loss_from_logps(
        logp, torch.tensor([-1.0, -1.0]), old_per_token_logps=old, off_policy_mask_threshold=0.1, backend=backend
    )
    assert out.metrics["off_policy/frac_dropped"].item() == 0


def test_a_rollout_that_is_nan_leaves_masked_rows_at_zero():
    logp = torch.tensor([[float("nan"), -1.0, -1.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0]])
    rlvr_ops.gmpo_loss_from_logps(
        logp, torch.tensor([1.0]), old_per_token_logps=torch.full((1, 3), -1.0), completion_mask=mask
    ).loss.backward()
    assert logp.grad[0, 2].item() == 0


EXTREMES = [
    (-120.0, -1.0, -1.0),
    (-91.0, -1.0, -1.0),
    (-1.0, -120.0, -1.0),
    (-1.0, -120.0, -1.5),
    (-200.0, -199.5, -1.0),
]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("point", EXTREMES, ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
def test_a_bias_corrected_divergence_is_what_float64_says(estimator, point, backend):
    def divergence(dtype, backend):
        logp, old, ref = (torch.full((1, 1), value, dtype=dtype) for value in point)
        logp.requires_grad_()
        out = policy_loss_from_logps(
            logp, torch.zeros(1, dtype=dtype), old_per_token_logps=old, ref_per_token_logps=ref, beta=1.0,
            kl_estimator=estimator, use_bias_correction_kl=True, backend=backend,
        )  # fmt: skip
        return torch.stack([out.loss.detach(), out.metrics["kl"], torch.autograd.grad(out.loss, logp)[0][0, 0]])

    truth = divergence(torch.float64, "torch").clamp(max=torch.finfo(torch.float32).max)
    found = divergence(torch.float32, backend)
    limit = torch.finfo(torch.float32).max
    torch.testing.assert_close(found.double().clamp(-limit, limit), truth.clamp(-limit, limit), rtol=2e-5, atol=1e-6)
    if estimator == "k3" and point[0] < -90 and point[1] == -1:
        assert found.tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-6)


def test_a_token_that_the_policy_rules_out_has_a_finite_corrected_divergence():
    logp = torch.full((1, 1), -float("inf"), requires_grad=True)
    old, ref = torch.full((1, 1), -2.0), torch.full((1, 1), -1.0)
    out = policy_loss_from_logps(
        logp, torch.zeros(1), old_per_token_logps=old, ref_per_token_logps=ref, beta=1.0, use_bias_correction_kl=True
    )
    assert out.loss.item() == pytest.approx(torch.tensor(1.0).exp().item())


# Compilation


SCHEDULED = {
    "epsilon_high": {}, "epsilon_low": {}, "alpha": {}, "beta": {}, "entropy_coef": {"schedule": "two_pass"},
    "temperature": {}, "logit_scale": {}, "softcap": {}, "off_policy_mask_threshold": {},
    "delta": {"epsilon_high": 0.05}, "num_items_in_batch": {}, "sampling_clip_max": {"sampling_correction": "token_truncate"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "dynamic"), [*((name, None) for name in SCHEDULED), ("epsilon_high", True)])
def test_a_scheduled_hyper_parameter_is_compiled_once_and_has_its_effect(name, dynamic):
    hidden, weight, ids, advantages, ref = dense_batch(dtype=torch.float64)
    given = {"ref_per_token_logps": ref, "old_per_token_logps": ref + 0.05, "alpha": 0.5, **SCHEDULED[name]}
    if name.startswith("sampling"):
        given["sampling_per_token_logps"] = ref

    def step(hidden, value):
        return rlvr_ops.ace_loss(hidden, weight, ids, advantages, **{**given, name: value}).loss

    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=3):
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for value in [1.1 + 0.07 * i for i in range(6)] if name in ("delta",) else [0.3 + 0.05 * i for i in range(6)]:
            leaf = hidden.clone().requires_grad_()
            (grad,) = torch.autograd.grad(compiled(leaf, value), leaf)
            (truth,) = torch.autograd.grad(step(leaf, value), leaf)
            assert_same(grad, truth, 1e-12, name)


@pytest.mark.parametrize("schedule", ["auto", "two_pass"])
def test_records_and_new_shapes_compile_with_dynamic_shapes(schedule):
    hidden, weight, ids, advantages, ref = dense_batch()

    def step(hidden, ids, advantages, ref, objective):
        rollouts = Rollouts(ids, advantages, ref)
        return rlvr_ops.policy_loss(hidden, Head(weight), rollouts, objective, Plan(schedule=schedule)).loss

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens, alpha in ((6, 0.5), (5, 1.0), (3, 0.7)):
        leaf = hidden[:, :tokens].clone().requires_grad_()
        arguments = ids[:, :tokens], advantages, ref[:, :tokens], Objective(Clip(0.1), Ace(alpha), KL(beta=0.1))
        (grad,) = torch.autograd.grad(compiled(leaf, *arguments), leaf)
        (truth,) = torch.autograd.grad(step(leaf, *arguments), leaf)
        assert_same(grad, truth, 1e-6)


# Pickles


@pytest.mark.parametrize("name", [n for n in rlvr_ops.__all__ if callable(getattr(rlvr_ops, n))])
def test_every_public_callable_survives_a_pickle(name):
    thing = getattr(rlvr_ops, name)
    assert pickle.loads(pickle.dumps(thing)) is thing


def test_every_record_survives_a_pickle():
    records = [
        Objective(Clip(0.1, 0.2, 3.0), Ace(), KL("k1", 0.1), sampling=rlvr_ops.SamplingCorrection("token_mask")),
        Plan(schedule="two_pass"),
        *(make() for make in rlvr_ops.surrogates.SURROGATES.values()),
    ]
    for record in records:
        assert pickle.loads(pickle.dumps(record)) == record
    for record in (Head(torch.ones(3, 2), softcap=2.0), Rollouts(torch.ones(2, 3, dtype=torch.long), torch.ones(2))):
        again = pickle.loads(pickle.dumps(record))
        for field in fields(record):
            a, b = getattr(record, field.name), getattr(again, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert all(is_dataclass(r) and r.__dataclass_params__.frozen for r in records)
    loss = pickle.loads(pickle.dumps(rlvr_ops.ACELoss(alpha=0.5)))
    assert loss.objective.ace == Ace(0.5)


@pytest.mark.parametrize("name", [n for n in rlvr_ops.__all__ if n.endswith(("_loss", "_loss_from_logps"))])
def test_the_losses_are_functions_with_typed_signatures(name):
    function = getattr(rlvr_ops, name)
    assert inspect.isfunction(function)
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert parameter.kind is not inspect.Parameter.VAR_KEYWORD


# A reference that is the policy


@pytest.mark.parametrize("shape", [(16, 64, 64, 50_000), (2, 16, 32, 151_936)])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_reference_equal_to_the_policy_shifts_by_no_more_than_rounding(shape, schedule, dtype):
    """The README's claim, with its figure."""
    b, t, h, v = shape
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=g).to(dtype) for s in ((b, t, h), (v, h)))
    ids, advantages = torch.randint(v, (b, t), generator=g), torch.tensor([1.0, -1.0] * (b // 2))
    with torch.no_grad():
        ref = rlvr_ops.token_logps(hidden, weight, ids).logps
    out = rlvr_ops.ace_loss(hidden, weight, ids, advantages, ref_per_token_logps=ref, schedule=schedule)
    gap = (out.per_token_logps - ref).abs().max().item()
    largest = ref.abs().max().item()
    assert gap <= 4 * torch.finfo(out.per_token_logps.dtype).eps * largest
    assert abs(out.metrics["ace/shift/mean"].item()) <= gap
    if dtype == torch.float32:
        assert gap <= 2e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_reference_scored_by_the_same_call_shifts_by_exactly_zero(schedule):
    hidden, weight, ids, advantages, ref = dense_batch()
    first = rlvr_ops.ace_loss(hidden, weight, ids, advantages, ref_per_token_logps=ref, schedule=schedule)
    again = rlvr_ops.ace_loss(
        hidden, weight, ids, advantages, ref_per_token_logps=first.per_token_logps, schedule=schedule
    )
    assert again.metrics["ace/shift/mean"].item() == 0.0
    assert again.metrics["ace/weight/max"].item() == pytest.approx(1.6931472, rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_entropy_bonus_under_a_softcap_has_no_nan_where_exponentials_underflow(schedule, dtype):
    """Logits near both caps, 120 apart: exp(-120) is 0 in float32, and log 0 no logit."""
    hidden, weight, ids, advantages, _ = dense_batch()
    leaves = [(30 * x).to(dtype).detach().requires_grad_() for x in (hidden, weight)]
    options = {"entropy_coef": 0.01, "softcap": 30.0, "temperature": 0.5, "schedule": schedule}
    out = rlvr_ops.grpo_loss(*leaves, ids, advantages, **options)
    for gradient in torch.autograd.grad(out.loss, leaves):
        assert gradient.isfinite().all()


# The reference


def test_the_reference_leaves_the_advantages_alone_and_takes_a_temperature_of_no_dimension():
    hidden, weight, ids, advantages, ref = dense_batch()
    head = Head(weight, temperature=torch.tensor(1.5))
    rollouts = Rollouts(ids, advantages, ref, ref + 0.5)
    objective = Objective(Clip(), ace=Ace(alpha=0.0), off_policy_mask_threshold=0.01)
    found, truth = (
        rlvr_ops.policy_loss(hidden, head, rollouts, objective),
        reference_policy_loss(hidden, head, rollouts, objective),
    )
    torch.testing.assert_close(found.loss, truth.loss)
    for name in ("ace/weight/mean", "ace/shift/mean"):
        torch.testing.assert_close(found.metrics[name], truth.metrics[name])
    assert truth.metrics["ace/weight/mean"].item() == 1


def test_the_library_agrees_with_itself_after_all_this():
    small = make_batch(SMALL, 17, 5)
    given = {"completion_mask": small.mask, "ref_per_token_logps": small.ref, "alpha": 1.0}
    losses = [
        policy_loss(small.hidden, small.weight, small.ids, small.advantages, schedule=s, **given) for s in SCHEDULES
    ]
    assert_same(losses[0].loss, losses[1].loss, 1e-12)

"""A surrogate of the user's own: the built-in ones written as functions, in every schedule, and what is refused."""

from dataclasses import replace

import pytest
import torch
from loss_cases import SMALL, assert_all_same, make_batch, pack, policy_loss, policy_loss_from_logps, run


def ppo(per_token_logps, rows):
    ratio = (per_token_logps - rows.old_per_token_logps).exp()
    return -torch.minimum(ratio * rows.advantages, ratio.clamp(0.8, 1.2) * rows.advantages)


def gspo(per_token_logps, rows):
    ratio = rows.rollout_mean(per_token_logps - rows.old_per_token_logps).exp()
    return -torch.minimum(ratio * rows.advantages, ratio.clamp(0.95, 1.05) * rows.advantages)


def vespo(per_token_logps, rows):
    w = rows.rollout_sum(per_token_logps - rows.old_per_token_logps).exp().detach()
    right = rows.advantages > 0
    k, lam = torch.where(right, 2.0, 3.0), torch.where(right, 3.0, 2.0)
    return -(w**k) * (lam * (1 - w)).exp() * rows.advantages * per_token_logps


def reinforce(per_token_logps, rows):
    return -rows.advantages * per_token_logps


SAME = {
    "ppo_clip": (ppo, {}),
    "gspo": (gspo, {"importance_sampling_level": "sequence", "epsilon_low": 0.05}),
    "vespo": (vespo, {"surrogate": "vespo"}),
    "reinforce": (reinforce, {"surrogate": "reinforce"}),
}
AROUND = {
    "plain": {},
    "ace-kl": {"alpha": 1.0, "beta": 0.1, "use_bias_correction_kl": True},
    "entropy": {"entropy_coef": 0.1, "alpha": 0.5, "confidence": "old"},
    "masked": {"off_policy_mask_threshold": 0.01, "loss_type": "dapo"},
}


CASES = [(name, around, "torch") for name in SAME for around in AROUND]
CASES += [pytest.param("gspo", "ace-kl", "triton", marks=pytest.mark.interpret)]


@pytest.mark.parametrize(("name", "around", "backend"), CASES)
def test_a_function_is_the_built_in_surrogate_that_it_writes_out(name, around, backend):
    dtype = torch.float64 if backend == "torch" else torch.float32
    function, built_in = SAME[name]
    padded = make_batch(SMALL, 17, 5).to(dtype)
    for batch in (padded, pack(padded)):
        given = {"ref_per_token_logps": batch.ref, **AROUND[around], "score_inactive": True, "backend": backend}
        for old in (batch.old, None):
            given["old_per_token_logps"] = old
            truth = run(policy_loss, batch, use_bias=True, **given, **built_in)
            for schedule in ("single_pass", "two_pass"):
                out, grads = run(policy_loss, batch, use_bias=True, surrogate=function, schedule=schedule, **given)
                assert out.metrics["head/single_pass"].item() == (schedule == "single_pass")
                kept = {k: v for k, v in truth[0].metrics.items() if not k.startswith(("clip_ratio", "head/"))}
                wanted = truth[0]._replace(metrics=kept), truth[1]
                scale = 1.0 if dtype is torch.float32 else 0.0
                assert_all_same((out, grads), wanted, dtype, f"{schedule} {old is None}", scale)


def test_it_takes_several_chunks_of_whole_rollouts():
    batch = make_batch()
    given = {"old_per_token_logps": batch.old, "ref_per_token_logps": batch.ref, "alpha": 1.0}
    room = 8 * 507 * 75
    truth = run(policy_loss, batch, importance_sampling_level="sequence", epsilon_low=0.05, **given)
    out, grads = run(policy_loss, batch, surrogate=gspo, workspace_bytes=room, schedule="single_pass", **given)
    assert out.loss.item() == pytest.approx(truth[0].loss.item(), rel=1e-12)
    for a, b in zip(grads[:2], truth[1][:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_from_log_probabilities_it_is_the_same_number():
    batch = make_batch(SMALL, 17, 5)
    logps = (batch.old + 0.1).requires_grad_()
    given = {"old_per_token_logps": batch.old, "completion_mask": batch.mask}
    found, wanted = (policy_loss_from_logps(logps, batch.advantages, surrogate=s, **given) for s in (ppo, "ppo_clip"))
    assert found.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-12)
    torch.testing.assert_close(
        *(torch.autograd.grad(out.loss, logps)[0] for out in (found, wanted)), rtol=1e-12, atol=0
    )


def test_it_sees_the_tokens_that_count_and_nothing_else():
    seen = []

    def look(per_token_logps, rows):
        seen.append((per_token_logps.detach(), rows))
        return -rows.advantages * per_token_logps

    batch = make_batch(SMALL, 17, 5)
    given = {"old_per_token_logps": batch.old, "sampling_per_token_logps": batch.sampling, "schedule": "two_pass"}
    run(policy_loss, batch, surrogate=look, **given)
    logps, rows = seen[0]
    count = int(batch.mask.sum())
    assert logps.shape == rows.advantages.shape == rows.old_per_token_logps.shape == rows.rollout.shape == (count,)
    assert torch.equal(rows.old_per_token_logps, batch.old[batch.mask])
    torch.testing.assert_close(
        rows.sampling_per_token_logps, batch.sampling[batch.mask], rtol=0, atol=0, equal_nan=True
    )
    assert rows.ref_per_token_logps is None
    assert rows.rollouts == len(SMALL)
    assert torch.equal(rows.rollout.bincount(minlength=4), batch.mask.sum(1))


def test_the_sampling_correction_and_ace_are_in_the_advantages_it_gets():
    seen = []

    def look(per_token_logps, rows):
        seen.append(rows.advantages)
        return -rows.advantages * per_token_logps

    logp = torch.full((2, 1), -1.0, requires_grad=True)
    policy_loss_from_logps(
        logp, torch.tensor([1.0, -1.0]), surrogate=look, old_per_token_logps=logp.detach(), alpha=1.0,
        ref_per_token_logps=logp.detach(), sampling_per_token_logps=logp.detach() - 0.5, sampling_correction="token_truncate",
    )  # fmt: skip
    assert seen[0].tolist() == pytest.approx([1.6487213, -1.6487213 * 1.6931472], rel=1e-6)


@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
def test_a_batch_in_which_nothing_counts_is_zero_and_attached(schedule):
    batch = make_batch(SMALL, 17, 5, poison=False)
    batch = replace(batch, mask=torch.zeros_like(batch.mask))
    out, grads = run(policy_loss, batch, surrogate=ppo, schedule=schedule, old_per_token_logps=batch.old)
    assert out.loss.item() == 0
    assert not bool(grads[0].any())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda logps, rows: -logps.sum(), r"surrogate must return one loss per token, \(n,\) = \(6,\), got \(\)"),
        (lambda logps, rows: 0.0, r"surrogate must return one loss per token, \(n,\) = \(6,\), got float"),
        (lambda logps, rows: logps.detach(), "surrogate must return something differentiable in per_token_logps"),
    ],
)
def test_what_it_returns_is_checked(function, message):
    with pytest.raises(ValueError, match=message):
        policy_loss_from_logps(torch.zeros(2, 3), torch.ones(2), surrogate=function)


def test_a_level_of_importance_sampling_is_the_functions_own_affair():
    with pytest.raises(ValueError, match="does not go with a surrogate function"):
        policy_loss_from_logps(torch.zeros(2, 3), torch.ones(2), surrogate=ppo, importance_sampling_level="sequence")


@pytest.mark.parametrize("room", [8 * 507 * 75, None])
def test_a_rollouts_number_is_its_number_in_the_batch_whatever_the_chunks(room):
    """A weight per rollout that a function brings along, several chunks of whole rollouts or one."""
    batch = make_batch()
    importance = torch.linspace(0.5, 2.0, len(batch.advantages), dtype=torch.float64)

    def weighted(per_token_logps, rows):
        assert rows.rollouts == len(importance)
        return -importance[rows.rollout] * rows.advantages * per_token_logps

    truth = run(policy_loss, replace(batch, advantages=batch.advantages * importance), surrogate="reinforce")
    for schedule in ("single_pass", "two_pass"):
        out, grads = run(policy_loss, batch, surrogate=weighted, workspace_bytes=room, schedule=schedule)
        assert out.loss.item() == pytest.approx(truth[0].loss.item(), rel=1e-12)
        for a, b in zip(grads[:2], truth[1][:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_a_function_that_looks_beyond_a_rollout_is_refused_where_chunks_would_make_it_wrong():
    def beyond(per_token_logps, rows):
        return -(rows.advantages - rows.advantages.mean()) * per_token_logps

    batch = make_batch()
    run(policy_loss, batch, surrogate=beyond, schedule="two_pass")
    run(policy_loss, batch, surrogate=beyond, schedule="single_pass", workspace_bytes=8 * 507 * 300)
    with pytest.raises(ValueError, match="surrogate must depend on nothing outside of a token's rollout"):
        run(policy_loss, batch, surrogate=beyond, schedule="single_pass", workspace_bytes=8 * 507 * 75)


def test_a_function_of_the_whole_batch_that_says_so_is_called_once():
    calls = []

    def beyond(per_token_logps, rows):
        calls.append(len(per_token_logps))
        return -(rows.advantages - rows.advantages.mean()) * per_token_logps

    batch = make_batch()
    truth = run(policy_loss, batch, surrogate=beyond, schedule="two_pass")
    beyond.whole_batch = True
    out, grads = run(policy_loss, batch, surrogate=beyond, workspace_bytes=8 * 507 * 75)
    assert calls == [int(batch.mask.sum())] * 2
    assert out.loss.item() == pytest.approx(truth[0].loss.item(), rel=1e-12)
    for a, b in zip(grads[:2], truth[1][:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


class Clip:
    """A callable that is false as a truth value."""

    def __len__(self):
        return 0

    def __call__(self, per_token_logps, rows):
        return -3 * rows.advantages * per_token_logps


def test_a_callable_that_counts_as_false_is_a_function_still():
    batch = make_batch(SMALL, 17, 5)
    one, two = (run(policy_loss, batch, surrogate=Clip(), schedule=s) for s in ("single_pass", "two_pass"))
    assert one[0].loss.item() == pytest.approx(two[0].loss.item(), rel=1e-12)


@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
@pytest.mark.parametrize("old", [True, False])
def test_it_runs_under_torch_compile_with_a_break_in_the_graph(schedule, old):
    batch = make_batch(SMALL, 17, 5, poison=False)
    given = {"old_per_token_logps": batch.old if old else None, "schedule": schedule, "surrogate": gspo}

    def step(hidden, weight):
        return policy_loss(hidden, weight, batch.ids, batch.advantages, **given).loss

    torch.compiler.reset()
    found, truth = [], []
    for name, call in ((found, torch.compile(step, backend="aot_eager")), (truth, step)):
        hidden, weight, _ = batch.leaves()
        loss = call(hidden, weight)
        name += [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_same_number(context):
    batch = make_batch(SMALL, 17, 5)
    truth = run(policy_loss, batch, surrogate=gspo, old_per_token_logps=batch.old)[0].loss.item()
    with context():
        out = policy_loss(
            batch.hidden, batch.weight, batch.ids, batch.advantages, completion_mask=batch.mask, surrogate=gspo,
            old_per_token_logps=batch.old,
        )  # fmt: skip
    assert out.loss.item() == pytest.approx(truth, rel=1e-12)


def test_a_parameter_inside_it_does_not_hide_that_it_ignores_the_log_probabilities():
    scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="something differentiable in per_token_logps"):
        policy_loss_from_logps(torch.zeros(2, 3), torch.ones(2), surrogate=lambda logps, rows: scale * rows.advantages)

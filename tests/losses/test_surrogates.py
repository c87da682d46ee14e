"""Each surrogate, KL gradient, mask and correction on numbers worked out by hand."""

import math

import pytest
import torch
from loss_cases import policy_loss, policy_loss_from_logps

import rlvr_ops
from rlvr_ops import surrogates

LN = math.log


def loss_and_coef(log_ratios, advantages, *, logps=-1.0, **kwargs):
    """Loss and dL/dlogp of one rollout whose tokens have these log ratios; the log-probabilities themselves are `logps`."""
    x = torch.tensor(log_ratios, dtype=torch.float64).reshape(1, -1)
    logp = torch.full_like(x, logps).requires_grad_()
    given = torch.as_tensor(advantages, dtype=torch.float64).expand(x.shape)
    kwargs = {"loss_type": "luspo", **kwargs}  # the sum over the rollout's tokens
    out = policy_loss_from_logps(logp, given, old_per_token_logps=logps - x, **kwargs)
    return out.loss.item(), torch.autograd.grad(out.loss, logp)[0][0].tolist()


@pytest.mark.parametrize(
    ("surrogate", "ratio", "advantage", "loss", "coef"),
    [
        # -sg[min(rho, 5)] A logp at logp = -1: the loss is w A, the slope -w A
        ("cispo", 2.0, 1.0, 2.0, -2.0),
        ("cispo", 8.0, 1.0, 5.0, -5.0),
        ("cispo", 8.0, -1.0, -5.0, 5.0),
        ("cispo", 0.01, -1.0, -0.01, 0.01),
        # clip(rho, 0.8, 1.2), for either sign
        ("cispo_two_sided", 2.0, 1.0, 1.2, -1.2),
        ("cispo_two_sided", 0.5, -3.0, -2.4, 2.4),
        # A > 0: clip(rho, 0.8, 11); A < 0: clip(rho, 0, 101)
        ("dispo", 20.0, 1.0, 11.0, -11.0),
        ("dispo", 0.1, 1.0, 0.8, -0.8),
        ("dispo", 20.0, -1.0, -20.0, 20.0),
        ("dispo", 0.1, -1.0, -0.1, 0.1),
        # -4 sigmoid(0) A = -2 A at rho = 1, slope -4/4 rho A = -A;  tau = 1.05 for A < 0: loss 2 / 1.05
        ("sapo", 1.0, 1.0, -2.0, -1.0),
        ("sapo", 1.0, -1.0, 2 / 1.05, 1.0),
        # rho = 1 + ln 3: sigmoid = 3/4, loss -3, slope -4 (3/4)(1/4) rho
        ("sapo", 1 + LN(3), 1.0, -3.0, -0.75 * (1 + LN(3))),
        # W^2 exp(3 (1 - W)): 1 at W = 1; at W = 2 it is 4 e^-3. For A < 0 W^3 exp(2 (1 - W)) = 8 e^-2
        ("vespo", 1.0, 1.0, 1.0, -1.0),
        ("vespo", 2.0, 1.0, 4 * math.exp(-3), -4 * math.exp(-3)),
        ("vespo", 2.0, -1.0, -8 * math.exp(-2), 8 * math.exp(-2)),
        # log rho clipped at 0.4 from above for A > 0, at -0.4 from below for A < 0
        ("gmpo", math.exp(0.5), 1.0, -math.exp(0.4), 0.0),
        ("gmpo", math.exp(0.5), -1.0, math.exp(0.5), math.exp(0.5)),
        ("gmpo", math.exp(-0.5), -1.0, math.exp(-0.4), 0.0),
        ("gmpo", math.exp(-0.5), 1.0, -math.exp(-0.5), -math.exp(-0.5)),
        ("reinforce", 7.0, 2.0, 2.0, -2.0),
    ],
)
def test_one_token_by_hand(surrogate, ratio, advantage, loss, coef):
    got, slope = loss_and_coef([LN(ratio)], advantage, surrogate=surrogate)
    assert got == pytest.approx(loss, rel=1e-12)
    assert slope == pytest.approx([coef], rel=1e-12, abs=1e-15)


def test_gspo_clips_the_rollouts_geometric_mean_and_shares_its_slope():
    """Ratios 2 and 1/2 have the mean 1: nothing is clipped, and each token has half of the slope of two terms -s A."""
    loss, coef = loss_and_coef([LN(2), -LN(2)], 1.0, importance_sampling_level="sequence", epsilon_low=0.1)
    assert loss == pytest.approx(-2.0)
    assert coef == pytest.approx([-1.0, -1.0])
    loss, coef = loss_and_coef([LN(2), LN(2)], 1.0, importance_sampling_level="sequence", epsilon_low=0.1)
    assert loss == pytest.approx(-2.2)
    assert coef == [0.0, 0.0]


def test_gspo_tokens_keep_their_own_slope_with_advantages_of_their_own():
    """s = 1. The sequence form shares -(1 + 3) / 2 over both tokens; the token form leaves -1 and -3."""
    for level, coef in (("sequence", [-2.0, -2.0]), ("sequence_token", [-1.0, -3.0])):
        loss, found = loss_and_coef([LN(2), -LN(2)], [1.0, 3.0], importance_sampling_level=level)
        assert loss == pytest.approx(-4.0)
        assert found == pytest.approx(coef)


def test_gmpo_is_the_mean_of_clipped_log_ratios():
    """A > 0: log ratios 0.6 and 0.1 become 0.4 and 0.1; s = exp(0.25); only the second token has a slope, -2 s / 2."""
    loss, coef = loss_and_coef([0.6, 0.1], 1.0, surrogate="gmpo")
    assert loss == pytest.approx(-2 * math.exp(0.25))
    assert coef == pytest.approx([0.0, -math.exp(0.25)])


def test_vespo_multiplies_the_rollouts_ratios():
    """W = 2 * 2 * 1/2 = 2, and every token's weight is W^2 exp(3 (1 - W))."""
    _, coef = loss_and_coef([LN(2), LN(2), -LN(2)], 1.0, surrogate="vespo")
    assert coef == pytest.approx([-4 * math.exp(-3)] * 3)


@pytest.mark.parametrize("c", [1.5, 3.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.3, 2.0, 5.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_dual_clip_is_delta(ratio, advantage, c):
    x = torch.tensor(LN(ratio), dtype=torch.float64, requires_grad=True)
    rho = x.exp()
    inner = torch.max(-advantage * rho, -advantage * rho.clamp(0.8, 1.2))
    dual = torch.min(torch.tensor(-advantage * c), inner) if advantage < 0 else inner
    loss, coef = loss_and_coef([LN(ratio)], advantage, delta=c)
    assert loss == pytest.approx(dual.item())
    assert coef == pytest.approx([torch.autograd.grad(dual, x)[0].item() if dual.requires_grad else 0.0])


@pytest.mark.parametrize("surrogate", surrogates.SURROGATES)
def test_ace_multiplies_the_wrong_rollouts_advantage(surrogate):
    """c = ln 2 for both rollouts; softplus(ln 2) = ln 3, so the wrong one counts 1 + ln 3 times."""
    logp = torch.tensor([[-1.0, -2.0], [-1.5, -0.5]], dtype=torch.float64, requires_grad=True)
    given = {"old_per_token_logps": logp.detach() - 0.1, "surrogate": surrogate, "loss_type": "luspo"}
    weighted = policy_loss_from_logps(
        logp, torch.tensor([1.0, -1.0]).double(), ref_per_token_logps=logp.detach() - LN(2), alpha=1.0, **given
    )
    by_hand = policy_loss_from_logps(logp, torch.tensor([1.0, -1 - LN(3)], dtype=torch.float64), **given)
    assert weighted.loss.item() == pytest.approx(by_hand.loss.item(), rel=1e-12)
    found, wanted = (torch.autograd.grad(out.loss, logp)[0] for out in (weighted, by_hand))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def kl_gradient(estimator, corrected, logits, ref, old):
    """The exact expectation, over tokens sampled by `old`, of the gradient of the KL term of a one-token policy."""
    total = torch.zeros_like(logits)
    for token, p in enumerate(old.softmax(0)):
        leaf = logits.clone().requires_grad_()
        logp = leaf.log_softmax(0)[token].reshape(1, 1)
        out = policy_loss_from_logps(
            logp, torch.zeros(1).double(), old_per_token_logps=old.log_softmax(0)[token].reshape(1, 1),
            ref_per_token_logps=ref.log_softmax(0)[token].reshape(1, 1), beta=1.0, kl_estimator=estimator,
            use_bias_correction_kl=corrected,
        )  # fmt: skip
        total += p * torch.autograd.grad(out.loss, leaf)[0]
    return total


@pytest.fixture
def policies():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3)]


def divergence_gradient(logits, ref, *, forward=False):
    leaf = logits.clone().requires_grad_()
    logp, logq = leaf.log_softmax(0), ref.log_softmax(0)
    value = (logq.exp() * (logq - logp)).sum() if forward else (logp.exp() * (logp - logq)).sum()
    return torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_corrected_kl_has_the_reverse_kls_gradient_whoever_sampled(policies, estimator):
    logits, ref, old = policies
    found = kl_gradient(estimator, True, logits, ref, old)
    torch.testing.assert_close(found, divergence_gradient(logits, ref), rtol=1e-12, atol=1e-14)


def test_what_the_uncorrected_estimators_gradients_are_on_policy(policies):
    """k1's is 0 on average, k2's the reverse KL's, k3's the forward KL's."""
    logits, ref, _ = policies
    on_policy = {name: kl_gradient(name, False, logits, ref, logits) for name in ("k1", "k2", "k3")}
    torch.testing.assert_close(on_policy["k1"], torch.zeros(5).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(on_policy["k2"], divergence_gradient(logits, ref), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(on_policy["k3"], divergence_gradient(logits, ref, forward=True), rtol=1e-12, atol=1e-14)


def test_the_corrected_k3_is_what_differentiating_rho_k3_gives():
    logp = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    old, ref = torch.tensor([[-1.3, -1.9]]).double(), torch.tensor([[-0.7, -2.5]]).double()
    out = policy_loss_from_logps(
        logp, torch.zeros(1).double(), old_per_token_logps=old, ref_per_token_logps=ref, beta=1.0,
        use_bias_correction_kl=True, loss_type="luspo",
    )  # fmt: skip
    plain = ((logp - old).exp() * ((ref - logp).exp() - (ref - logp) - 1)).sum()
    assert out.loss.item() == pytest.approx(plain.item(), rel=1e-12)
    found, wanted = (torch.autograd.grad(x, logp)[0] for x in (out.loss, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_a_stale_wrong_rollout_loses_its_surrogate_and_keeps_its_kl():
    """Mean of old - logp: 0.3, above 0.2, in both. The wrong one is dropped, the right one stays; the KL stays in both."""
    logp = torch.full((2, 2), -1.0, dtype=torch.float64, requires_grad=True)
    old, ref = logp.detach() + torch.tensor([0.1, 0.5]), logp.detach() - 1
    out = policy_loss_from_logps(
        logp, torch.tensor([-1.0, 1.0]).double(), old_per_token_logps=old, ref_per_token_logps=ref, beta=0.1,
        kl_estimator="k2", off_policy_mask_threshold=0.2, surrogate="reinforce", loss_type="luspo",
    )  # fmt: skip
    (coef,) = torch.autograd.grad(out.loss, logp)
    torch.testing.assert_close(coef, torch.tensor([[0.05, 0.05], [-0.45, -0.45]]).double(), rtol=1e-6, atol=0)
    assert out.metrics["off_policy/frac_dropped"].item() == 1.0
    again = policy_loss_from_logps(
        logp, torch.tensor([-1.0, 1.0]).double(), old_per_token_logps=old, off_policy_mask_threshold=0.4
    )
    assert again.metrics["off_policy/frac_dropped"].item() == 0.0


def test_what_the_sampler_did_not_score_is_no_evidence_of_staleness():
    """sampling - logp is (0.5, unknown): the mean over two tokens is 0.25."""
    logp = torch.full((1, 2), -1.0)
    sampling = torch.tensor([[-0.5, float("nan")]])
    for threshold, dropped in ((0.2, 1.0), (0.3, 0.0)):
        out = policy_loss_from_logps(
            logp, torch.tensor([-1.0]), sampling_per_token_logps=sampling, off_policy_mask_threshold=threshold
        )
        assert out.metrics["off_policy/frac_dropped"].item() == dropped


@pytest.mark.parametrize(
    ("correction", "bounds", "weights"),
    [
        # exp(old - sampling) is 4, 1/2 and, unknown, 1; the product is 2
        ("token_truncate", {}, [3.0, 0.5, 1.0]),
        ("token_truncate", {"sampling_clip_min": 0.8}, [3.0, 0.8, 1.0]),
        ("token_mask", {}, [0.0, 0.5, 1.0]),
        ("token_mask", {"sampling_clip_min": 0.8}, [0.0, 0.0, 1.0]),
        ("sequence_truncate", {}, [2.0] * 3),
        ("sequence_truncate", {"sampling_clip_max": 1.5}, [1.5] * 3),
        ("sequence_mask", {}, [2.0] * 3),
        ("sequence_mask", {"sampling_clip_max": 1.5}, [0.0] * 3),
    ],
)
def test_the_sampling_correction_by_hand(correction, bounds, weights):
    logp = torch.full((1, 3), -1.0, dtype=torch.float64, requires_grad=True)
    sampling = torch.tensor([[-1 - LN(4), -1 + LN(2), float("nan")]], dtype=torch.float64)
    out = policy_loss_from_logps(
        logp, torch.tensor([1.0]).double(), old_per_token_logps=logp.detach(), sampling_per_token_logps=sampling,
        sampling_correction=correction, loss_type="luspo", **bounds,
    )  # fmt: skip
    (coef,) = torch.autograd.grad(out.loss, logp)
    assert coef[0].tolist() == pytest.approx([-w for w in weights])
    name = "sampling/importance_sampling_ratio"
    found = [out.metrics[f"{name}/{what}"].item() for what in ("min", "mean", "max")]
    assert found == pytest.approx([min(weights), sum(weights) / 3, max(weights)])


def test_the_entropy_bonus_is_aggregated_like_the_loss():
    """grpo: the mean over rollouts of their means, (2 + (1 + 3) / 2) / 2 = 2."""
    logp = torch.zeros(2, 2, dtype=torch.float64)
    entropy = torch.tensor([[2.0, 9.0], [1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0], [1, 1]])
    given = {"per_token_entropies": entropy, "completion_mask": mask, "entropy_coef": 0.5}
    out = policy_loss_from_logps(logp, torch.zeros(2).double(), **given)
    assert out.loss.item() == pytest.approx(-1.0)
    (slope,) = torch.autograd.grad(out.loss, entropy)
    assert slope.tolist() == [[-0.25, 0.0], [-0.125, -0.125]]


@pytest.mark.parametrize("share", [0.25, 0.3, 0.5, 0.8, 1.0])
def test_only_the_most_uncertain_tokens_learn(share):
    """The quantile of the active tokens' entropies, as torch.quantile has it."""
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(4, 7, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 7, generator=generator) > 0.3
    logp = torch.full((4, 7), -1.0, dtype=torch.float64, requires_grad=True)
    out = policy_loss_from_logps(
        logp, torch.ones(4).double(), per_token_entropies=entropy.masked_fill(~mask, float("nan")), completion_mask=mask,
        top_entropy_quantile=share,
    )  # fmt: skip
    (coef,) = torch.autograd.grad(out.loss, logp)
    wanted = mask & (entropy >= torch.quantile(entropy[mask], 1 - share))
    assert torch.equal(coef != 0, wanted)


def test_top_entropy_from_hidden_states_is_top_entropy_from_log_probabilities():
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    weight, ids = torch.randn(11, 4, dtype=torch.float64), torch.randint(11, (3, 5))
    advantages = torch.tensor([1.0, -1.0, 0.0]).double()
    given = {"top_entropy_quantile": 0.4, "entropy_coef": 0.1, "loss_type": "dapo"}
    out = policy_loss(hidden, weight, ids, advantages, **given)
    scores = rlvr_ops.token_logps(hidden, weight, ids, with_entropy=True)
    same = policy_loss_from_logps(scores.logps, advantages, per_token_entropies=scores.entropy, **given)
    assert out.loss.item() == pytest.approx(same.loss.item(), rel=1e-12)
    found, wanted = (torch.autograd.grad(x.loss, hidden)[0] for x in (out, same))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)
    assert out.metrics["head/rows_pulled_back"].item() == 6  # 0.4 of 15


@pytest.mark.parametrize(
    ("surrogate", "low", "high"), [("reinforce", 0.0, 0.0), ("cispo_two_sided", 0.5, 0.25), ("gmpo", 0.25, 0.25)]
)
def test_clip_ratios_count_the_tokens_outside_of_their_bounds(surrogate, low, high):
    """Ratios 1/2, 3, 1/3 and 1 for A = 1, 1, -1 and -1; REINFORCE has no bounds, gmpo one for each sign."""
    logp = torch.zeros(1, 4)
    given = {"old_per_token_logps": torch.tensor([[LN(2), -LN(3), LN(3), 0.0]]), "surrogate": surrogate}
    out = policy_loss_from_logps(logp, torch.tensor([[1.0, 1.0, -1.0, -1.0]]), **given)
    assert out.metrics["clip_ratio/low_mean"].item() == low
    assert out.metrics["clip_ratio/high_mean"].item() == high


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("surrogate", ["ppo_clip", "sapo", "gmpo", "vespo", "cispo"])
def test_ratios_that_overflow_leave_no_nan(surrogate, level):
    if surrogate in ("gmpo", "vespo") and level != "token":
        level = "token"
    if surrogate == "cispo" and level == "sequence_token":
        level = "sequence"
    for x in ([800.0, 800.0], [-800.0, -800.0], [800.0, -800.0]):
        for advantage in (1.0, 0.0):
            loss, coef = loss_and_coef(x, advantage, surrogate=surrogate, importance_sampling_level=level)
            assert not math.isnan(loss)
            assert not any(map(math.isnan, coef))


def test_no_bound_is_none():
    logp, sampling = torch.zeros(1, 1), torch.full((1, 1), -LN(50))
    out = policy_loss_from_logps(
        logp, torch.ones(1), old_per_token_logps=logp, sampling_per_token_logps=sampling,
        sampling_correction="token_truncate", sampling_clip_max=None,
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(-50)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_token_that_cannot_be_has_no_nan_gradient(backend, level):
    """A bias of -inf bans it: its log-probability is -inf, its ratio 0, and its derivative 0 (or its rollout's share)."""
    logp = torch.tensor([[-1.0, -math.inf, -1.0]], requires_grad=True)
    out = policy_loss_from_logps(
        logp, torch.tensor([1.0]), old_per_token_logps=torch.full((1, 3), -1.0), importance_sampling_level=level,
        epsilon_low=0.5, loss_type="luspo", backend=backend,
    )  # fmt: skip
    (coef,) = torch.autograd.grad(out.loss, logp)
    assert coef[0].tolist() == ([-1.0, 0.0, -1.0] if level == "token" else [0.0, 0.0, 0.0])


@pytest.mark.parametrize("ratio", [8.0, 12.0, 16.0, 20.0])
def test_sapos_slope_keeps_its_digits_far_out(ratio):
    """-4 sigmoid(x) sigmoid(-x) rho with x = rho - 1; 1 - sigmoid(x) would round it away in float32."""
    logp = torch.zeros(1, 1, requires_grad=True)
    out = policy_loss_from_logps(
        logp, torch.ones(1), old_per_token_logps=torch.tensor([[-LN(ratio)]]), surrogate="sapo"
    )
    (coef,) = torch.autograd.grad(out.loss, logp)
    x = ratio - 1
    exact = -4 * ratio / ((1 + math.exp(-x)) * (1 + math.exp(x)))
    assert coef.item() == pytest.approx(exact, rel=2e-5)  # rho itself is known to 1e-6, and exp(-rho) to rho times that


def test_gmpo_takes_nothing_from_a_token_without_advantage():
    """Log ratios 0.2, 5 and 0.1 with A = 1, 0, 1: the mean of 0.2, 0 and 0.1, as verl's sign(0) = 0 makes it."""
    loss, coef = loss_and_coef([0.2, 5.0, 0.1], [1.0, 0.0, 1.0], surrogate="gmpo")
    assert loss == pytest.approx(-2 * math.exp(0.1))
    assert coef == pytest.approx([-2 / 3 * math.exp(0.1), 0.0, -2 / 3 * math.exp(0.1)])


def test_wrong_rollouts_are_those_of_the_batch_and_not_of_the_most_uncertain_tokens():
    logp, ref = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]]), torch.tensor([[-2.0, -2.0], [-0.5, -0.5]])
    out = policy_loss_from_logps(
        logp, torch.tensor([-1.0, -1.0]), ref_per_token_logps=ref, alpha=1.0, top_entropy_quantile=0.25,
        per_token_entropies=torch.tensor([[3.0, 0.0], [1.0, 2.0]]),
    )  # fmt: skip
    assert out.metrics["ace/shift/mean"].item() == pytest.approx((1.0 - 0.5) / 2)

"""Every formula on numbers small enough to work out by hand; the arithmetic is in the comments."""

import math

import pytest
import torch
from loss_cases import policy_loss_from_logps, reference_policy_loss_from_logps

import rlvr_ops
from rlvr_ops.reference import reference_ace_advantages, reference_token_logps

LN2, LN5 = math.log(2), math.log(5)
IMPLEMENTATIONS = {"reference": reference_policy_loss_from_logps, "rlvr_ops": policy_loss_from_logps}
TOKEN_LOGPS = pytest.mark.parametrize("token_logps", [reference_token_logps, rlvr_ops.token_logps])


@pytest.fixture(params=IMPLEMENTATIONS)
def loss_and_coef(request):
    """Compute (loss, dL/dlogp, output) in float64."""

    def compute(logps, advantages, **kwargs):
        logps = torch.as_tensor(logps, dtype=torch.float64).requires_grad_()
        kwargs = {k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in kwargs.items()}
        out = IMPLEMENTATIONS[request.param](logps, torch.tensor(advantages, dtype=torch.float64), **kwargs)
        (coef,) = torch.autograd.grad(out.loss, logps)
        return out.loss.item(), coef.tolist(), out

    return compute


def log(ratio):
    return math.log(ratio)


def about(values):
    return pytest.approx(values, rel=1e-12, abs=1e-14)


# Two rollouts, of two tokens and of one. On policy every token's loss is -A: -1, -1 and 3.
RAGGED = {"logps": [[-1.0, -2.0], [-0.5, -9.0]], "advantages": [1.0, -3.0], "completion_mask": [[1.0, 1.0], [1.0, 0.0]]}


@pytest.mark.parametrize(
    ("loss_type", "extra", "expected", "per_token"),
    [
        ("grpo", {}, (-1 + 3) / 2, [-1 / 4, -1 / 4, 3 / 2]),  # mean of the rollouts' means -1 and 3
        ("grpo", {"num_items_in_batch": 8}, (-1 + 3) / 8, [-1 / 16, -1 / 16, 3 / 8]),  # 8 rollouts in the global batch
        ("dapo", {}, (-1 - 1 + 3) / 3, [-1 / 3, -1 / 3, 1]),  # 3 tokens
        ("dapo", {"num_items_in_batch": 12}, 1 / 12, [-1 / 12, -1 / 12, 3 / 12]),
        ("bnpo", {}, 1 / 3, [-1 / 3, -1 / 3, 1]),
        ("dr_grpo", {}, 1 / 4, [-1 / 4, -1 / 4, 3 / 4]),  # 2 rollouts x T = 2
        ("dr_grpo", {"max_completion_length": 5}, 1 / 10, [-1 / 10, -1 / 10, 3 / 10]),
        ("dr_grpo", {"max_completion_length": 5, "num_items_in_batch": 4}, 1 / 20, [-1 / 20, -1 / 20, 3 / 20]),
    ],
)
def test_the_denominator_of_each_loss_type(loss_and_coef, loss_type, extra, expected, per_token):
    loss, coef, _ = loss_and_coef(**RAGGED, loss_type=loss_type, **extra)
    assert loss == about(expected)
    assert coef == [about(per_token[:2]), about([per_token[2], 0.0])]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "coef"),
    [
        (0.5, 1.0, -0.5, -0.5),  # min(0.5, 0.8): the token is rarer than it was and should be likelier, so it is pushed
        (1.1, 1.0, -1.1, -1.1),
        (1.5, 1.0, -1.2, 0.0),  # min(1.5, 1.2): already raised far enough
        (0.5, -1.0, 0.8, 0.0),  # min(-0.5, -0.8): already lowered far enough
        (0.9, -1.0, 0.9, 0.9),
        (1.5, -1.0, 1.5, 1.5),  # min(-1.5, -1.2): no clip on this side
        (1.5, -2.0, 3.0, 3.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_clip_takes_the_pessimistic_side(loss_and_coef, ratio, advantage, expected, coef):
    loss, got, _ = loss_and_coef([[log(ratio) - 1]], [advantage], old_per_token_logps=[[-1.0]])
    assert loss == about(expected)
    assert got == [about([coef])]


@pytest.mark.parametrize("off", [1e4, -1e4])
def test_a_token_without_advantage_is_zero_whatever_its_ratio(loss_and_coef, off):
    """exp(1e4) is inf, and 0 x inf must not be NaN. The second token: KL alone, slope 0.25 (1 - exp(ref - logp)) / 2."""
    loss, coef, _ = loss_and_coef([[-1.0, LN2 - 3.0]], [0.0], old_per_token_logps=[[-1.0 - off, -3.0]])
    assert (loss, coef) == (0.0, [[0.0, 0.0]])
    loss, coef, _ = loss_and_coef(
        [[-1.0, LN2 - 3.0]],
        [0.0],
        old_per_token_logps=[[-1.0 - off, -3.0]],
        ref_per_token_logps=[[-1.0, -3.0]],
        beta=0.25,
    )
    assert loss == about(0.25 * (0.5 + LN2 - 1) / 2)
    assert coef == [about([0.0, 0.25 * 0.5 / 2])]


def test_clip_higher_leaves_room_above_only(loss_and_coef):
    ratios = [[log(1.25), log(1.3), log(0.75)]]
    # A = 1: min(1.25, 1.25), min(1.3, 1.28), min(0.75, 0.8) -> -(1.25 + 1.28 + 0.75) / 3
    loss, coef, out = loss_and_coef(ratios, [1.0], old_per_token_logps=[[0.0] * 3], epsilon_low=0.2, epsilon_high=0.28)
    assert loss == about(-(1.25 + 1.28 + 0.75) / 3)
    assert coef == [about([-1.25 / 3, 0.0, -0.75 / 3])]
    assert out.metrics["clip_ratio/high_mean"].item() == about(1 / 3)
    assert out.metrics["clip_ratio/low_mean"].item() == 0
    # A = -1: max(1.25, 1.25), max(1.3, 1.28), max(0.75, 0.8)
    loss, coef, out = loss_and_coef(ratios, [-1.0], old_per_token_logps=[[0.0] * 3], epsilon_low=0.2, epsilon_high=0.28)
    assert loss == about((1.25 + 1.3 + 0.8) / 3)
    assert coef == [about([1.25 / 3, 1.3 / 3, 0.0])]
    assert out.metrics["clip_ratio/low_mean"].item() == about(1 / 3)
    assert out.metrics["clip_ratio/region_mean"].item() == about(1 / 3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "coef"),
    [
        (3.0, -1.0, 2.0, 0.0),  # min(min(3, 2) (-1), 1.2 (-1)) = -2: bounded, and flat
        (1.5, -1.0, 1.5, 1.5),
        (3.0, 1.0, -1.2, 0.0),  # min(2, 1.2): delta changes nothing for A > 0
        (0.5, -1.0, 0.8, 0.0),
    ],
)
def test_delta_bounds_the_other_side(loss_and_coef, ratio, advantage, expected, coef):
    loss, got, _ = loss_and_coef([[log(ratio)]], [advantage], old_per_token_logps=[[0.0]], delta=2.0)
    assert loss == about(expected)
    assert got == [about([coef])]


@pytest.mark.parametrize(
    ("estimator", "kl", "slope"),
    [
        ("k1", LN2, 1.0),  # logp - ref
        ("k2", LN2**2 / 2, LN2),  # (logp - ref)^2 / 2
        ("k3", 0.5 + LN2 - 1, 0.5),  # exp(ref - logp) - (ref - logp) - 1, slope 1 - exp(ref - logp)
    ],
)
def test_each_kl_estimator_at_logp_minus_ref_of_ln_2(loss_and_coef, estimator, kl, slope):
    loss, coef, out = loss_and_coef(
        [[LN2 - 3.0]], [0.0], ref_per_token_logps=[[-3.0]], beta=0.25, kl_estimator=estimator
    )
    assert loss == about(0.25 * kl)
    assert coef == [about([0.25 * slope])]
    assert out.metrics["kl"].item() == about(kl)


# c, softplus(c) to six places, and the multiplier 1 + softplus(c)
MULTIPLIERS = [(-5.0, 1.006715), (-1.0, 1.313262), (0.0, 1.693147), (1.0, 2.313262), (5.0, 6.006715)]


@pytest.mark.parametrize(("c", "multiplier"), MULTIPLIERS)
def test_a_wrong_rollout_is_weighted_by_its_confidence(loss_and_coef, c, multiplier):
    # On policy, one token: the loss is -A' = multiplier, and so is its slope, for c is held constant.
    loss, coef, out = loss_and_coef([[-1.0 + c]], [-1.0], ref_per_token_logps=[[-1.0]], alpha=1.0)
    assert loss == pytest.approx(multiplier, abs=5e-7)
    assert coef == [pytest.approx([multiplier], abs=5e-7)]
    assert out.metrics["ace/shift/mean"].item() == about(c)
    assert out.metrics["ace/weight/max"].item() == pytest.approx(multiplier, abs=5e-7)
    loss, coef, _ = loss_and_coef([[-1.0 + c]], [2.0], ref_per_token_logps=[[-1.0]], alpha=1.0)
    assert (loss, coef) == (-2.0, [[-2.0]])  # a right rollout is not touched


@pytest.mark.parametrize(("c", "multiplier"), [(-5.0, 1.0), (0.0, 1.0), (1.0, 2.0), (5.0, 6.0)])
def test_relu_weighs_nothing_below_the_reference(loss_and_coef, c, multiplier):
    loss, _, _ = loss_and_coef([[-1.0 + c]], [-1.0], ref_per_token_logps=[[-1.0]], alpha=1.0, shape="relu")
    assert loss == about(multiplier)


def test_alpha_scales_the_penalty_alone(loss_and_coef):
    loss, _, _ = loss_and_coef([[-1.0]], [-2.0], ref_per_token_logps=[[-2.0]], alpha=0.5, shape="relu")
    assert loss == about(2 * (1 + 0.5 * 1))


@pytest.mark.parametrize(("reduction", "c"), [("mean", 2.0), ("sum", 4.0)])
def test_the_shift_is_the_mean_or_the_sum_over_active_tokens(loss_and_coef, reduction, c):
    # shifts 1 and 3; the third token, with shift 100, is masked
    loss, coef, out = loss_and_coef(
        [[0.0, 0.0, 0.0]],
        [-1.0],
        ref_per_token_logps=[[-1.0, -3.0, -100.0]],
        completion_mask=[[1.0, 1.0, 0.0]],
        alpha=1.0,
        shape="relu",
        confidence_reduction=reduction,
    )
    assert loss == about(1 + c)
    assert coef == [about([(1 + c) / 2, (1 + c) / 2, 0.0])]
    assert out.metrics["ace/shift/mean"].item() == about(c)


@pytest.mark.parametrize(("confidence", "c"), [("current", 3.0), ("old", 2.0)])
def test_the_shift_is_that_of_the_current_or_of_the_old_policy(loss_and_coef, confidence, c):
    # logp - ref = 3, old - ref = 2; the ratio e is above 1 + epsilon_high, and with A < 0 not clipped
    loss, coef, _ = loss_and_coef(
        [[-1.0]],
        [-1.0],
        old_per_token_logps=[[-2.0]],
        ref_per_token_logps=[[-4.0]],
        alpha=1.0,
        shape="relu",
        confidence=confidence,
    )
    assert loss == about(math.e * (1 + c))
    assert coef == [about([math.e * (1 + c)])]


def test_wrong_rollouts_are_counted_in_three_classes(loss_and_coef):
    logps = [[1.0], [0.04], [-0.04], [-3.0], [7.0]]
    _, _, out = loss_and_coef(
        logps, [-1.0, -1.0, -1.0, -1.0, 1.0], ref_per_token_logps=[[0.0]] * 5, alpha=1.0, shape="relu"
    )
    m = {name: value.item() for name, value in out.metrics.items()}
    assert m["ace/frac_overconfident"] == about(1 / 4)
    assert m["ace/frac_exploratory"] == about(2 / 4)
    assert m["ace/frac_self_correcting"] == about(1 / 4)
    assert m["ace/shift/mean"] == about((1 + 0.04 - 0.04 - 3) / 4)
    assert m["ace/weight/mean"] == about((2 + 1.04 + 1 + 1) / 4)
    assert m["ace/weight/max"] == about(2)


def test_advantages_may_differ_from_token_to_token(loss_and_coef):
    # c = 1: only the negative ones are doubled: 1 -> -1, -2 -> 4, 0 -> 0
    loss, coef, _ = loss_and_coef(
        [[1.0, 1.0, 1.0]], [[1.0, -2.0, 0.0]], ref_per_token_logps=[[0.0] * 3], alpha=1.0, shape="relu"
    )
    assert loss == about((-1 + 4) / 3)
    assert coef == [about([-1 / 3, 4 / 3, 0.0])]


@pytest.mark.parametrize("ace_advantages", [reference_ace_advantages, rlvr_ops.ace_advantages])
def test_ace_advantages_by_hand(ace_advantages):
    advantages = torch.tensor([-1.0, -1.0, 2.0], dtype=torch.float64)
    logps = torch.tensor([[1.0, 3.0], [-1.0, 9.0], [5.0, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    ref = torch.zeros_like(logps)
    got = ace_advantages(advantages, logps, ref, mask, alpha=0.5, shape="relu")
    assert got.tolist() == about([-(1 + 0.5 * 2), -1.0, 2.0])


@TOKEN_LOGPS
def test_the_logits_are_scaled_then_capped_then_cooled(token_logps):
    h = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    bias = torch.tensor([0.0, 1.0], dtype=torch.float64)
    out = token_logps(h, weight, torch.tensor([[0]]), lm_head_bias=bias, logit_scale=0.5, softcap=2.0, temperature=0.25)
    # 0.5 (1 + 0), 0.5 (2 + 1) -> 2 tanh(0.25), 2 tanh(0.75) -> times 4
    z0, z1 = 8 * math.tanh(0.25), 8 * math.tanh(0.75)
    assert out.logps.item() == about(-math.log1p(math.exp(z1 - z0)))


@TOKEN_LOGPS
def test_what_the_logits_say_about_a_token(token_logps):
    # z = ln 1, ln 2, ln 5, so that p = 1/8, 2/8, 5/8
    weight = torch.tensor([[0.0], [LN2], [LN5]], dtype=torch.float64)
    h = torch.ones(1, 3, 1, dtype=torch.float64)
    out = token_logps(h, weight, torch.tensor([[0, 1, 2]]), with_entropy=True, with_self_certainty=True, with_top1=True)
    assert out.logps[0].tolist() == about([math.log(1 / 8), math.log(2 / 8), math.log(5 / 8)])
    assert out.entropy[0].tolist() == about([(3 * LN2 + 2 * 2 * LN2 + 5 * (3 * LN2 - LN5)) / 8] * 3)
    assert out.self_certainty[0].tolist() == about([3 * LN2 - (LN2 + LN5) / 3 - math.log(3)] * 3)
    assert out.top1[0].tolist() == [False, False, True]


@TOKEN_LOGPS
def test_a_temperature_per_rollout_and_per_token(token_logps):
    weight = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    h = torch.full((2, 1, 1), 2.0, dtype=torch.float64)
    ids = torch.zeros(2, 1, dtype=torch.long)
    # the target's logit is 0, the other's 2 / temperature
    expected = about([-math.log1p(math.exp(2.0)), -math.log1p(math.exp(0.5))])
    for temperature in (torch.tensor([1.0, 4.0]), torch.tensor([[1.0], [4.0]])):
        assert token_logps(h, weight, ids, temperature=temperature).logps[:, 0].tolist() == expected

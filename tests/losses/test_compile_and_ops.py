"""torch.compile without a graph break, and torch.library's own checks of every custom op."""

import pytest
import torch
from loss_cases import SMALL, assert_same, make_batch, pack
from rlvr_kernels.logits import Head
from rlvr_kernels.spec import PPO_CLIP, PolicySpec

import rlvr_ops
from rlvr_ops import ops, surrogates
from rlvr_ops.spec_text import decode_head, decode_policy, encode

HEAD, POLICY = encode(Head(0.9, 3.0)), encode(PolicySpec(PPO_CLIP, alpha=1.0, beta=0.1))
ROOM = 8 * 17 * 6


@pytest.fixture
def flat():
    """The flat arguments that the ops take, for 12 rows of 4 rollouts."""
    batch = pack(make_batch(SMALL, 17, 5, poison=False))
    rows = batch.ids.shape[0]
    advantages = batch.advantages.repeat_interleave(batch.cu_seqlens.diff())
    weights = torch.full((4,), 0.25, dtype=torch.float64)
    hidden, weight, bias = batch.leaves()
    cool = 1 / batch.temperature
    return batch, rows, advantages, weights, hidden, weight, bias, cool


SPECS = [
    PolicySpec(PPO_CLIP),
    PolicySpec(surrogates.ppo_clip(1e-3, 1 / 3, 2.0), "sequence", 0.3, 0.1, "k1", True, 1, "relu", "old", "sum"),
    *(PolicySpec(make()) for make in surrogates.SURROGATES.values()),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_spec_survives_its_text(spec):
    assert decode_policy(encode(spec)) == spec


@pytest.mark.parametrize("head", [Head(-1e-30, 30), Head()])
def test_a_head_survives_its_text(head):
    assert decode_head(encode(head)) == head


@pytest.mark.parametrize(("scored", "statistics", "keep"), [(True, (False,) * 4, 0), (False, (True,) * 4, 1 << 20)])
def test_opcheck_score(flat, scored, statistics, keep):
    batch, *_, hidden, weight, bias, cool = flat
    mask = batch.mask if scored else None
    args = (hidden, weight, bias, batch.ids, mask, cool, HEAD, torch.float64, *statistics, ROOM, keep, "torch")
    torch.library.opcheck(ops.score, args)


def test_opcheck_pull_back(flat):
    batch, rows, _advantages, _weights, hidden, weight, bias, cool = flat
    coef = torch.randn(rows, dtype=torch.float64) * batch.mask
    lse, entropy = torch.rand(2, rows, dtype=torch.float64)
    inputs = (hidden.detach(), weight.detach(), bias.detach(), batch.ids, batch.mask, cool, lse, coef)
    kept = torch.randn(int(batch.mask.sum()) * weight.shape[0], dtype=torch.float64)
    for entropy_coef, needs in ((None, (False, True, False)), (coef * 0.1, (True, True, True))):
        args = (*inputs, entropy, entropy_coef, kept, HEAD, torch.float64, *needs, ROOM, "torch")
        torch.library.opcheck(ops.pull_back, args)


@pytest.mark.parametrize("off_policy", [True, False])
def test_opcheck_weigh(flat, off_policy):
    batch, _rows, advantages, weights, *_ = flat
    logp = (batch.ref + 0.1).requires_grad_()
    old = batch.old if off_policy else None
    behaviour = None if off_policy else batch.old
    args = (logp, old, batch.ref, advantages, batch.mask, batch.cu_seqlens, weights, behaviour, POLICY, "torch")
    torch.library.opcheck(ops.weigh, args)


@pytest.mark.parametrize(("scored", "with_entropy"), [(True, False), (False, True)])
def test_opcheck_single_pass(flat, scored, with_entropy):
    batch, _rows, advantages, weights, hidden, weight, bias, cool = flat
    mask = batch.mask if scored else None
    args = (
        hidden, weight, bias, batch.ids, mask, cool, batch.old, batch.ref, None, advantages, batch.cu_seqlens, weights,
        POLICY, HEAD, torch.float64, True, True, True, with_entropy, 0.1 * with_entropy, ROOM, "torch",
    )  # fmt: skip
    # Backward scales the op's own gradient buffers in place, so that no second d_weight exists; the library drops them, but
    # this check of AOT dispatch looks at them afterwards. So it is made without a backward, and for that there is the
    # comparison of compiled losses below.
    others = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.single_pass, args, test_utils=others)
    quiet = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
    torch.library.opcheck(ops.single_pass, quiet)


CASES = {
    "ace": {"alpha": 1.0, "beta": 0.1},
    "two-pass": {"alpha": 1.0, "schedule": "two_pass"},
    "dapo-old": {"alpha": 1.0, "confidence": "old", "loss_type": "dapo", "delta": 2.0},
    "temperatures": {"temperature": True, "softcap": 3.0, "with_entropy": True},
    "gspo": {"importance_sampling_level": "sequence", "use_bias_correction_kl": True, "beta": 0.1},
    "vespo": {"surrogate": "vespo", "entropy_coef": 0.1},
    "off-policy-mask": {"surrogate": surrogates.gmpo(0.3), "off_policy_mask_threshold": 0.05},
    "top-entropy": {"surrogate": "cispo", "top_entropy_quantile": 0.5},
    "everything-scored": {"score_inactive": True, "loss_type": "dr_grpo", "max_completion_length": 9},
}


@pytest.mark.parametrize(("case", "packed"), [*((case, False) for case in CASES), ("ace", True), ("dapo-old", True)])
def test_a_loss_compiles_whole_and_gives_the_same(case, packed):
    batch = make_batch(SMALL, 17, 5)
    batch = pack(batch) if packed else batch
    given = {"old_per_token_logps": batch.old, "ref_per_token_logps": batch.ref, "completion_mask": batch.mask}
    given |= {**CASES[case], **batch.packing}
    if given.get("temperature"):
        given["temperature"] = batch.temperature

    def step(hidden, weight, bias):
        out = rlvr_ops.policy_loss(hidden, weight, batch.ids, batch.advantages, lm_head_bias=bias, **given)
        return 2.0 * out.loss, out.metrics, out.per_token_logps

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves, other = batch.leaves(), batch.leaves()
    loss, metrics, logps = compiled(*leaves)
    true_loss, true_metrics, true_logps = step(*other)
    loss.backward()
    true_loss.backward()
    assert_same(loss.detach(), true_loss.detach(), 1e-14)
    torch.testing.assert_close(logps, true_logps, rtol=1e-14, atol=0, equal_nan=True)
    for name in true_metrics.keys() - {"head/single_pass"}:
        assert metrics[name].item() == pytest.approx(true_metrics[name].item(), rel=1e-12), name
    for a, b in zip(leaves, other, strict=True):
        assert_same(a.grad, b.grad, 1e-13)


def test_losses_from_log_probabilities_and_scores_compile_whole():
    batch = make_batch(SMALL, 17, 5)

    def step(hidden, weight, ref):
        scores = rlvr_ops.token_logps(
            hidden, weight, batch.ids, completion_mask=batch.mask, with_entropy=True, with_self_certainty=True
        )
        out = rlvr_ops.ace_loss_from_logps(
            scores.logps, batch.advantages, completion_mask=batch.mask, ref_per_token_logps=ref
        )
        return out.loss - 0.1 * scores.entropy.sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, step):
        hidden, weight, _ = batch.leaves()
        loss = function(hidden, weight, batch.ref)
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for a, b in zip(*results, strict=True):
        assert_same(a, b, 1e-13)


def test_new_lengths_and_new_hyper_parameters_do_not_break_the_graph():
    def step(hidden, weight, ids, advantages, temperature):
        return rlvr_ops.grpo_loss(
            hidden, weight, ids, advantages, temperature=temperature, logit_scale=temperature
        ).loss

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    weight = torch.randn(17, 5, requires_grad=True)
    for b, t, temperature in ((2, 3, 1.0), (3, 4, 0.9), (2, 7, 0.8)):
        inputs = torch.randint(17, (b, t)), torch.randn(b), temperature
        hidden = torch.randn(b, t, 5)
        (grad,) = torch.autograd.grad(compiled(hidden, weight, *inputs), weight)
        (truth,) = torch.autograd.grad(step(hidden, weight, *inputs), weight)
        assert_same(grad, truth, 1e-6)

"""torch.compile without a graph break, and torch.library's own checks of every custom op."""

from dataclasses import replace

import pytest
import torch
from loss_cases import SMALL, assert_same, make_batch, pack, policy_loss
from rlvr_kernels.logits import LogitMap
from rlvr_kernels.weigh import Rows

import rlvr_ops
from rlvr_ops import KL, Ace, Clip, Entropy, Objective, SamplingCorrection, surrogates
from rlvr_ops.head.compiled import decode, encode
from rlvr_ops.head.plan import Call, Schedule
from rlvr_ops.head.pull_back import pull_back_op
from rlvr_ops.head.token_logps import ScoreCall, scores_op
from rlvr_ops.losses.policy_loss import LossCall, loss_op
from rlvr_ops.losses.policy_loss_from_logps import WeighCall, weigh_op

ROOM = 8 * 17 * 6
PLAIN = Objective(Clip(), ace=Ace(alpha=1.0), kl=KL(beta=0.1))
OBJECTIVES = [
    PLAIN,
    Objective(
        Clip(1e-3, 1 / 3, 2.0), Ace(1, "old", "sum", "relu"), KL("k1", 0.1, True), "sequence", 0.3,
        Entropy(0.1, 0.5), SamplingCorrection("token_mask", None, 0.5), "token-mean", 7,
    ),
    *(Objective(make()) for make in surrogates.SURROGATES.values()),
]  # fmt: skip


@pytest.fixture
def flat():
    """(leaves, call, rows, batch) of 12 rows of 4 rollouts."""
    batch = pack(make_batch(SMALL, 17, 5, poison=False))
    advantages = batch.advantages.repeat_interleave(batch.cu_seqlens.diff())
    weights = torch.full((4,), 0.25, dtype=torch.float64)
    rows = Rows(advantages, batch.cu_seqlens, weights, batch.old, batch.ref, None, batch.mask)

    def call(single_pass, *, scored=True, entropy=False):
        logit_map = LogitMap(1 / batch.temperature, None, 0.9, 3.0)
        schedule = Schedule(single_pass, torch.float64, ROOM, "torch", entropy)
        return Call(batch.ids, batch.mask if scored else None, logit_map, schedule, (True, True, True))

    return batch.leaves(), call, rows, batch


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_record_survives_its_text(objective):
    assert decode(*encode(objective)) == objective


def test_the_tensors_of_a_record_survive_as_they_are(flat):
    _, call, rows, _ = flat
    job = LossCall(call(True), rows, PLAIN)
    again = decode(*encode(job))
    assert again.rows.advantages is rows.advantages
    assert again.call.logit_map.softcap == 3.0
    assert again.call.schedule == job.call.schedule


@pytest.mark.parametrize(("scored", "asked"), [(True, (False,) * 4), (False, (True,) * 4)])
def test_opcheck_token_logps(flat, scored, asked):
    leaves, call, *_ = flat
    record = ScoreCall(call(False, scored=scored, entropy=asked[0]), *asked)
    torch.library.opcheck(scores_op, (*leaves, *encode(record)))


def test_opcheck_pull_back(flat):
    leaves, call, rows, batch = flat
    coef = torch.randn(len(rows), dtype=torch.float64) * batch.mask
    lse, entropy = torch.rand(2, len(rows), dtype=torch.float64)
    inputs = [x.detach() for x in leaves]
    for entropy_coef, needs in ((None, (False, True, False)), (coef * 0.1, (True, True, True))):
        record = LossCall(replace(call(False), needs=needs), rows, PLAIN)
        torch.library.opcheck(pull_back_op, (*inputs, *encode(record), lse, coef, entropy, entropy_coef))


@pytest.mark.parametrize("off_policy", [True, False])
def test_opcheck_weigh(flat, off_policy):
    _, _, rows, batch = flat
    rows = rows if off_policy else replace(rows, old=None, sampling=batch.old)
    top = None if off_policy else batch.mask
    logp = (batch.ref + 0.1).requires_grad_()
    torch.library.opcheck(weigh_op, (logp, *encode(WeighCall(rows, top, PLAIN, "torch"))))


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("single_pass", [True, False])
def test_opcheck_policy_loss(flat, single_pass, entropy_coef):
    leaves, call, rows, _ = flat
    objective = replace(PLAIN, entropy=Entropy(entropy_coef))
    record = LossCall(call(single_pass, scored=not entropy_coef, entropy=entropy_coef > 0), rows, objective)
    args = (*leaves, *encode(record))
    torch.library.opcheck(loss_op, args)
    quiet = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
    torch.library.opcheck(loss_op, quiet)


def test_every_op_that_is_registered_has_its_check_here():
    checked = {op._qualname for op in (scores_op, pull_back_op, weigh_op, loss_op)}
    assert {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("rlvr_ops::")} == checked


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
        out = policy_loss(hidden, weight, batch.ids, batch.advantages, lm_head_bias=bias, **given)
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

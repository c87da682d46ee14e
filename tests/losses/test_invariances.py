"""What must not matter: padding, the order of rollouts, micro-batches, packing, chunk size, schedule. In float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import NAN, assert_same, make_batch, pack, poisoned, policy_loss, policy_loss_from_logps, run

import rlvr_ops
from rlvr_ops import surrogates


def sequence_hinge(per_token_logps, rows):
    """A surrogate of one's own that looks at the whole rollout."""
    ratio = rows.rollout_mean(per_token_logps - rows.old_per_token_logps).exp()
    return -torch.minimum(ratio * rows.advantages, 1.05 * rows.advantages)


VOCABULARY, HIDDEN = 11, 4
EXACT = 1e-12
ragged = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any)
schedules = st.sampled_from(("single_pass", "two_pass", "auto"))
LEVELS = ("token", "sequence", "sequence_token")
OTHERS = [  # what stands in the place of PPO's clip, or beside it
    *({"importance_sampling_level": level, "epsilon_low": 0.02} for level in LEVELS[1:]),
    {"surrogate": surrogates.cispo(1.05)},
    {"surrogate": surrogates.dispo((0.1, 0.2), (0.05, 0.3)), "importance_sampling_level": "sequence"},
    *({"surrogate": "sapo", "importance_sampling_level": level} for level in LEVELS),
    {"surrogate": surrogates.gmpo(0.2, 0.1)},
    {"surrogate": "vespo"},
    {"surrogate": "reinforce"},
    {"off_policy_mask_threshold": 0.02},
    {"entropy_coef": 0.1},
    *({"sampling_correction": f"{level}_{mode}"} for level in LEVELS[:2] for mode in ("truncate", "mask")),
    {"surrogate": sequence_hinge},
]


def merged(method, other):
    """A method with another surrogate, which has no delta, or with what needs the old log-probabilities."""
    method = {name: value for name, value in method.items() if name != "delta" or "surrogate" not in other}
    return method | other | ({"old": True} if "sampling_correction" in other else {})


def name_of(value):
    return getattr(value, "__name__", str(value))  # str() of a function has its address, which differs between workers


base = st.fixed_dictionaries(
    {"loss_type": st.sampled_from(("grpo", "dapo", "dr_grpo", "bnpo", "luspo"))},
    optional={
        "alpha": st.sampled_from((0.5, 1.0)),
        "confidence": st.sampled_from(("current", "old")),
        "confidence_reduction": st.sampled_from(("mean", "sum")),
        "beta": st.just(0.1),
        "use_bias_correction_kl": st.just(True),
        "kl_against": st.just("old"),
        "delta": st.just(1.5),
        "old": st.just(True),
        "with_entropy": st.just(True),
        "score_inactive": st.just(True),
    },
)
methods = base | st.builds(merged, base, st.sampled_from(OTHERS))
few = settings(max_examples=40, deadline=None, derandomize=True)


def batch_of(lengths, seed, **kwargs):
    return make_batch(tuple(lengths), VOCABULARY, HIDDEN, seed=seed, **kwargs)


def compute(batch, method, **kwargs):
    arguments = {"max_completion_length": 7, **method, **kwargs, "ref_per_token_logps": batch.ref}
    if arguments.pop("old", False):
        arguments["old_per_token_logps"] = batch.old
    if "sampling_correction" in arguments or "off_policy_mask_threshold" in arguments:
        arguments["sampling_per_token_logps"] = batch.sampling
    if arguments["loss_type"] != "dr_grpo":
        arguments.pop("max_completion_length")
    return run(policy_loss, batch, use_bias=True, **arguments)


def assert_same_result(got, truth, *, hidden=lambda x: x):
    """`hidden` maps the true d_hidden (and log-probabilities) to where the other batch has its rows."""
    (out, grads), (true, true_grads) = got, truth
    scale = true.per_token_logps.nan_to_num().abs().sum()
    assert_same(out.loss, true.loss, EXACT, "loss", scale=scale)
    assert_same(grads[0], hidden(true_grads[0]), EXACT, "d_hidden")
    assert_same(grads[1], true_grads[1], EXACT, "d_weight")
    assert_same(grads[2], true_grads[2], EXACT, "d_bias")
    torch.testing.assert_close(
        out.per_token_logps, hidden(true.per_token_logps), rtol=EXACT, atol=EXACT, equal_nan=True
    )
    for name, value in true.metrics.items():
        if not name.startswith("head/"):
            assert out.metrics[name].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-9), name


@few
@given(ragged, methods, schedules, st.integers(0, 9))
def test_padding_never_reaches_the_loss_or_a_gradient(lengths, method, schedule, seed):
    clean = batch_of(lengths, seed, poison=False)
    truth = compute(clean, method, schedule=schedule)
    got = compute(poisoned(clean), method, schedule=schedule)
    assert_same_result(got, truth)
    assert torch.equal(got[0].loss, truth[0].loss)
    assert not bool(got[1][0][~clean.mask].any())


@few
@given(ragged, methods, schedules, st.integers(1, 4))
def test_more_padding_changes_nothing(lengths, method, schedule, extra):
    batch = batch_of(lengths, 0)
    b = len(lengths)

    def widen(x, fill):
        return torch.cat([x, x.new_full((b, extra, *x.shape[2:]), fill)], dim=1)

    wide = replace(
        batch,
        hidden=widen(batch.hidden, NAN),
        ids=widen(batch.ids, -1),
        mask=widen(batch.mask, False),
        old=widen(batch.old, NAN),
        ref=widen(batch.ref, NAN),
        sampling=widen(batch.sampling, NAN),
    )
    truth = compute(batch, method, schedule=schedule)
    assert_same_result(compute(wide, method, schedule=schedule), truth, hidden=lambda x: widen(x, 0))


@few
@given(ragged, methods, schedules, st.randoms(use_true_random=False))
def test_the_order_of_rollouts_does_not_matter(lengths, method, schedule, random):
    batch = batch_of(lengths, 0)
    order = list(range(len(lengths)))
    random.shuffle(order)
    rows = ("hidden", "ids", "advantages", "mask", "old", "ref", "sampling")
    shuffled = replace(batch, **{name: getattr(batch, name)[order] for name in rows})
    truth = compute(batch, method, schedule=schedule)
    assert_same_result(compute(shuffled, method, schedule=schedule), truth, hidden=lambda x: x[order])


@few
@given(ragged, methods, schedules, st.booleans())
def test_packed_is_padded(lengths, method, schedule, keep_holes):
    padded = batch_of(lengths, 0)
    packed = pack(padded, keep_holes=keep_holes)
    rows = padded.mask if not keep_holes else None

    def cut(x):
        if rows is not None:
            return x[rows]
        ends = packed.cu_seqlens.diff().tolist()
        return torch.cat([x[i, :n] for i, n in enumerate(ends)])

    truth = compute(padded, method, schedule=schedule)
    assert_same_result(compute(packed, method, schedule=schedule), truth, hidden=cut)
    if not keep_holes:  # then every row counts, and a mask says nothing
        assert_same_result(compute(replace(packed, mask=None), method, schedule=schedule), truth, hidden=cut)


@few
@given(ragged, methods, st.integers(1, 80), st.integers(1, 80), st.booleans())
def test_the_workspace_does_not_matter(lengths, method, small, large, packed):
    batch = batch_of(lengths, 0)
    batch = pack(batch) if packed else batch
    truth = compute(batch, method)
    for logits, schedule in ((small, "two_pass"), (large, "two_pass"), (small, "auto"), (large, "auto")):
        assert_same_result(compute(batch, method, workspace_bytes=8 * logits, schedule=schedule), truth)
    longest = 8 * VOCABULARY * max(lengths)
    for room in (longest, longest + 8 * VOCABULARY * small):
        assert_same_result(compute(batch, method, workspace_bytes=room, schedule="single_pass"), truth)


@few
@given(ragged, methods, schedules, st.integers(0, 5))
def test_micro_batches_add_up_to_the_batch(lengths, method, schedule, cut):
    """With the global denominator: gradients are the one-batch gradients, to far better than 1e-6."""
    method = {**method, "loss_type": "dapo" if method["loss_type"] == "bnpo" else method["loss_type"]}
    batch = batch_of(lengths, 0)
    truth, true_grads = compute(batch, method, schedule=schedule)
    count = int(batch.mask.sum()) if method["loss_type"] == "dapo" else len(lengths)
    rows = ("hidden", "ids", "advantages", "mask", "old", "ref", "sampling")
    parts = [slice(0, cut), slice(cut, None)]
    pieces = [replace(batch, **{name: getattr(batch, name)[part] for name in rows}) for part in parts]
    done = [compute(piece, method, schedule=schedule, num_items_in_batch=count) for piece in pieces]
    scale = truth.per_token_logps.nan_to_num().abs().sum()
    assert_same(sum(out.loss for out, _ in done), truth.loss, EXACT, "loss", scale=scale)
    assert_same(torch.cat([grads[0] for _, grads in done]), true_grads[0], EXACT, "d_hidden")
    assert_same(sum(grads[1] for _, grads in done), true_grads[1], EXACT, "d_weight")
    assert_same(sum(grads[2] for _, grads in done), true_grads[2], EXACT, "d_bias")


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
def test_gradient_accumulation_in_float32_is_the_one_batch_gradient(loss_type, schedule):
    batch = make_batch(poison=False).to(torch.float32)
    method = {"alpha": 1.0, "beta": 0.01, "old": True, "loss_type": loss_type}
    _, whole = compute(batch, method, schedule=schedule)
    weight, bias = (x.clone().requires_grad_() for x in (batch.weight, batch.bias))
    count = int(batch.mask.sum()) if loss_type == "dapo" else len(batch.ids)
    for i in range(len(batch.ids)):
        one = replace(batch, **{n: getattr(batch, n)[i : i + 1] for n in ("ids", "advantages", "mask", "old", "ref")})
        out = policy_loss(
            batch.hidden[i : i + 1],
            weight,
            one.ids,
            one.advantages,
            completion_mask=one.mask,
            old_per_token_logps=one.old,
            ref_per_token_logps=one.ref,
            lm_head_bias=bias,
            alpha=1.0,
            beta=0.01,
            loss_type=loss_type,
            num_items_in_batch=torch.tensor(float(count)),
            max_completion_length=7 if loss_type == "dr_grpo" else None,
            schedule=schedule,
        )
        out.loss.backward()
    assert_same(weight.grad, whole[1], 1e-6, "d_weight")
    assert_same(bias.grad, whole[2], 1e-6, "d_bias")


@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
def test_the_same_call_gives_the_same_bits(schedule):
    batch = make_batch().to(torch.float32)
    method = {"alpha": 1.0, "beta": 0.01, "old": True, "loss_type": "dapo", "workspace_bytes": 4 * 507 * 80}
    first, second = (compute(batch, method, schedule=schedule) for _ in range(2))
    assert torch.equal(first[0].loss, second[0].loss)
    for a, b in zip(first[1], second[1], strict=True):
        assert torch.equal(a, b)


def test_as_many_packed_rows_as_rollouts_are_one_advantage_per_rollout():
    """(N,) = (B,) could mean either; a rollout's advantage must not depend on how many tokens the others happen to have."""
    logps = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 0, 1, 3])
    advantages = torch.tensor([100.0, 1.0, -2.0], dtype=torch.float64)
    out = policy_loss_from_logps(logps, advantages, cu_seqlens=cu_seqlens, loss_type="dapo")
    assert out.loss.item() == pytest.approx((-1 + 2 + 2) / 3)
    got = rlvr_ops.ace_advantages(advantages, logps, logps, cu_seqlens=cu_seqlens)
    assert got.tolist() == pytest.approx([100.0, 1.0, -2 * (1 + 0.6931471805599453)])


few_again = settings(max_examples=25, deadline=None, derandomize=True)


@few_again
@given(ragged, methods, schedules)
def test_a_rollout_without_advantage_changes_nothing_else(lengths, method, schedule):
    """Next to the others it counts in the denominator and nowhere else."""
    method = {name: value for name, value in method.items() if name not in ("beta", "entropy_coef", "with_entropy")}
    method |= {"loss_type": "dr_grpo"}
    batch = batch_of([*lengths, 3], 0)
    quiet = replace(batch, advantages=torch.cat([batch.advantages[:-1], torch.zeros(1)]))
    first = {n: getattr(batch, n)[:-1] for n in ("hidden", "ids", "advantages", "mask", "old", "ref", "sampling")}
    out, grads = compute(quiet, method, schedule=schedule, num_items_in_batch=5)
    true, true_grads = compute(replace(batch, **first), method, schedule=schedule, num_items_in_batch=5)
    scale = true.per_token_logps.nan_to_num().abs().sum()
    assert_same(out.loss, true.loss, EXACT, "loss", scale=scale)
    assert not bool(grads[0][-1].any())
    assert_same(grads[0][:-1], true_grads[0], EXACT, "d_hidden")
    assert_same(grads[1], true_grads[1], EXACT, "d_weight")


@few_again
@given(ragged, methods, schedules, st.sampled_from((0.25, 2.0, 8.0)))
def test_scaling_the_advantages_scales_the_gradient(lengths, method, schedule, factor):
    method = {name: value for name, value in method.items() if name not in ("beta", "entropy_coef")}
    batch = batch_of(lengths, 0)
    out, grads = compute(replace(batch, advantages=batch.advantages * factor), method, schedule=schedule)
    true, true_grads = compute(batch, method, schedule=schedule)
    scale = true.per_token_logps.nan_to_num().abs().sum()
    assert_same(out.loss, true.loss * factor, EXACT, "loss", scale=scale)
    for name, grad, true_grad in zip(("d_hidden", "d_weight", "d_bias"), grads, true_grads, strict=True):
        assert_same(grad, true_grad * factor, EXACT, name)


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: ",".join(map(name_of, other.values())))
def test_a_rollout_that_spans_chunks_is_seen_whole(other):
    """Room for 7 rows of logits, rollouts of up to 70: the loss is what it is with room for all."""
    batch = make_batch()
    method = merged({"loss_type": "grpo", "alpha": 1.0, "old": True}, other)
    truth = compute(batch, method, workspace_bytes=8 * 507 * 300)
    for schedule in ("two_pass", "auto"):
        got = compute(batch, method, workspace_bytes=8 * 507 * 7, schedule=schedule)
        assert_same_result(got, truth)

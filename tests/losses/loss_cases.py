"""Random batches with everything in them that a trainer meets, and the comparison every loss test uses."""

from dataclasses import dataclass, replace

import pytest
import torch

import rlvr_ops
from rlvr_ops import KL, Ace, Entropy, Head, Objective, Plan, Rollouts, reference, surrogates
from rlvr_ops.losses.ace import resolve
from rlvr_ops.objectives.objective import correction
from rlvr_ops.reference import reference_token_logps

RAGGED = (70, 61, 1, 0, 53, 67)  # N = 252 active rows of T = 70, one rollout with nothing in it
SMALL = (5, 3, 0, 4)
NAN = float("nan")


@dataclass(frozen=True)
class Batch:
    """The arguments of a loss, padded (B, T, H) or packed (N, H)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    ids: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor | None
    old: torch.Tensor
    ref: torch.Tensor
    sampling: torch.Tensor  # NaN for some tokens that count
    bias: torch.Tensor
    temperature: torch.Tensor  # one per token
    cu_seqlens: torch.Tensor | None = None

    def to(self, dtype):
        return self.map(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def map(self, f):
        return replace(self, **{name: f(x) for name, x in vars(self).items() if x is not None})

    @property
    def packing(self):
        return {} if self.cu_seqlens is None else {"cu_seqlens": self.cu_seqlens}

    def leaves(self):
        """Fresh (hidden, weight, bias) that want gradients."""
        return [x.detach().clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)]


def make_batch(lengths=RAGGED, vocabulary=507, hidden_size=123, *, holes=0.1, poison=True, seed=0, **head):
    """A padded float64 batch whose ratios and shifts spread over all branches; what is masked is NaN or -100.

    `head`, in the names of `reference_token_logps`, is what the old and the reference log-probabilities were computed
    under; `True` takes the batch's own bias or per-token temperature.
    """
    g = torch.Generator().manual_seed(seed)
    b, t = len(lengths), max(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.arange(t) < torch.tensor(lengths)[:, None]
    if holes:
        mask &= torch.rand(b, t, generator=g) >= holes
        for i, length in enumerate(lengths):  # a rollout that has tokens keeps one
            mask[i, 0] = length > 0
    weight = normal(vocabulary, hidden_size) / hidden_size**0.5
    batch = Batch(
        hidden=normal(b, t, hidden_size) * 1.5,
        weight=weight,
        ids=torch.randint(vocabulary, (b, t), generator=g),
        advantages=torch.tensor([1.0, -1.3, 0.4, 2.0, -0.5, 0.0][:b] + [(-1.0) ** i for i in range(6, b)]).double(),
        mask=mask,
        old=normal(b, t) * 0.25,
        ref=normal(b, t) * 0.2 + normal(b, 1) * 0.5,
        sampling=normal(b, t),
        bias=normal(vocabulary) * 0.3,
        temperature=0.7 + torch.rand(b, t, generator=g, dtype=torch.float64),
    )
    logps = reference_token_logps(batch.hidden, weight, batch.ids, **head_arguments(batch, head)).logps
    old = logps + batch.old
    sampling = (old + 0.1 * batch.sampling).masked_fill(batch.sampling > 1.5, NAN)
    batch = replace(batch, old=old, ref=logps + batch.ref, sampling=sampling)
    return poisoned(batch) if poison else batch


def head_arguments(batch, head):
    """Keyword arguments of the head, with the batch's own tensors where the value is True."""
    own = {"lm_head_bias": batch.bias, "temperature": batch.temperature}
    return {name: own[name] if value is True else value for name, value in head.items()}


def poisoned(batch):
    """The same batch with NaN states and log-probabilities and impossible ids wherever the mask is 0."""
    masked = ~batch.mask
    return replace(
        batch,
        hidden=batch.hidden.masked_fill(masked[..., None], NAN),
        ids=batch.ids.masked_fill(masked, -100),
        old=batch.old.masked_fill(masked, NAN),
        sampling=batch.sampling.masked_fill(masked, NAN),
        ref=batch.ref.masked_fill(masked, NAN),
    )


PER_TOKEN = ("hidden", "ids", "old", "ref", "sampling", "mask", "temperature")


def pack(batch, *, keep_holes=True):
    """The same rollouts without the padding after each: (N, ...) rows and cu_seqlens."""
    last = batch.mask.long() * torch.arange(1, batch.mask.shape[1] + 1)
    rows = torch.arange(batch.mask.shape[1]) < last.amax(dim=1, keepdim=True) if keep_holes else batch.mask
    lengths = rows.sum(dim=1)
    tokens = {name: getattr(batch, name)[rows] for name in PER_TOKEN}
    if batch.advantages.ndim == 2:
        tokens["advantages"] = batch.advantages[rows]
    return replace(batch, **tokens, cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]))


def take(flat, *names, **renamed):
    """Keyword arguments of a record out of flat ones, which lose them."""
    pairs = {**{name: name for name in names}, **renamed}
    return {field: flat.pop(name) for field, name in pairs.items() if name in flat}


def make_objective(flat):
    """The objective that a loss's flat keywords mean; they lose its names."""
    clip = take(flat, "surrogate", "epsilon_low", "epsilon_high", "delta")
    ace = take(flat, "alpha", "confidence", "shape", reduction="confidence_reduction")
    kl = take(flat, "beta", estimator="kl_estimator", bias_correction="use_bias_correction_kl", against="kl_against")
    entropy = take(flat, coef="entropy_coef", top_quantile="top_entropy_quantile")
    sampling = take(flat, kind="sampling_correction", clip_max="sampling_clip_max", clip_min="sampling_clip_min")
    others = take(
        flat, "importance_sampling_level", "off_policy_mask_threshold", "max_completion_length", aggregation="loss_type"
    )
    sampling = correction(**{"kind": None, "clip_max": 3.0, "clip_min": None, **sampling})
    surrogate = resolve(**{"surrogate": "ppo_clip", **clip})
    return Objective(
        surrogate,
        ace=Ace(**{"alpha": 0.0, **ace}),
        kl=KL(**kl),
        entropy=Entropy(**entropy),
        sampling=sampling,
        **others,
    )


TENSORS = (
    "ref_per_token_logps", "old_per_token_logps", "sampling_per_token_logps", "completion_mask", "cu_seqlens",
    "num_items_in_batch",
)  # fmt: skip


def policy_loss(hidden, weight, ids, advantages, *, of=rlvr_ops.policy_loss, **flat):
    """`rlvr_ops.policy_loss`, or its reference, by flat keywords."""
    objective = make_objective(flat)
    head = Head(weight, **take(flat, "logit_scale", "softcap", "temperature", bias="lm_head_bias"))
    rollouts = Rollouts(ids, advantages, **take(flat, *TENSORS))
    plan = Plan(**take(flat, "schedule", "workspace_bytes", "backend", "score_inactive", "with_entropy", "validate"))
    assert not flat, f"nobody knows {flat}"
    if of is rlvr_ops.policy_loss:
        return of(hidden, head, rollouts, objective, plan)
    return of(hidden, head, rollouts, objective, with_entropy=plan.with_entropy)


def reference_policy_loss(*args, **flat):
    return policy_loss(*args, of=reference.reference_policy_loss, **flat)


def policy_loss_from_logps(logps, advantages, *, of=rlvr_ops.policy_loss_from_logps, **flat):
    """`rlvr_ops.policy_loss_from_logps`, or its reference, by flat keywords."""
    objective = make_objective(flat)
    return of(logps, Rollouts(None, advantages, **take(flat, *TENSORS)), objective, **flat)


def reference_policy_loss_from_logps(*args, **flat):
    return policy_loss_from_logps(*args, of=reference.reference_policy_loss_from_logps, **flat)


def run(loss, batch, *, leaves=None, **kwargs):
    """(output, [d_hidden, d_weight, d_bias]) of a loss on a batch; a None gradient for a bias that is not used."""
    hidden, weight, bias = leaves or batch.leaves()
    if kwargs.pop("use_bias", False):
        kwargs["lm_head_bias"] = bias
    if batch.mask is not None:
        kwargs["completion_mask"] = batch.mask
    out = loss(hidden, weight, batch.ids, batch.advantages, **batch.packing, **kwargs)
    wanted = [x for x in (hidden, weight, bias) if x.requires_grad]
    found = dict(zip(map(id, wanted), torch.autograd.grad(out.loss, wanted, allow_unused=True), strict=True))
    return out, [found.get(id(x)) for x in (hidden, weight, bias)]


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def error(actual, truth, scale=0.0):
    """Largest absolute difference over the largest absolute true value (or `scale`): the tensor's relative error."""
    if truth.numel() == 0:
        return 0.0
    scale = max(truth.detach().abs().max().item(), float(scale))
    return (actual.double() - truth.double()).abs().max().item() / (scale or 1.0)


def assert_same(actual, truth, tolerance, name="", *, scale=0.0):
    """`scale` is for a sum that may cancel, which is known to rounding of its terms and not of itself."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(truth.shape)}"
    worst = error(actual, truth, scale)
    assert worst <= tolerance, f"{name}: relative error {worst:.2e} > {tolerance:.0e}"


LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "bnpo", "luspo")
HEADS = {
    "plain": {},
    "bias": {"lm_head_bias": True},
    "softcap": {"softcap": 3.0, "logit_scale": 0.7},
    "temperature": {"temperature": 0.6},
    "temperatures": {"temperature": True},
    "everything": {"lm_head_bias": True, "softcap": 4.0, "logit_scale": 1.3, "temperature": True},
}
METHODS = {
    "plain": {"old": True},
    "on-policy": {},
    "delta-kl": {"old": True, "delta": 1.5, "beta": 0.1, "ref": True},
    "clip-higher-k1": {
        "old": True, "epsilon_low": 0.1, "epsilon_high": 0.28, "beta": 0.05, "kl_estimator": "k1", "ref": True,
    },
    "ace": {"old": True, "ref": True, "alpha": 1.0},
    "ace-on-policy": {"ref": True, "alpha": 0.5},
    "ace-on-policy-old-k2": {"ref": True, "alpha": 1.0, "confidence": "old", "beta": 0.02, "kl_estimator": "k2"},
    "ace-old": {"old": True, "ref": True, "alpha": 1.0, "confidence": "old"},
    "ace-sum-relu-kl": {
        "old": True, "ref": True, "alpha": 0.3, "confidence_reduction": "sum", "shape": "relu", "beta": 0.1,
    },
    "ace-old-sum-delta": {
        "old": True, "ref": True, "alpha": 0.3, "confidence": "old", "confidence_reduction": "sum", "delta": 1.4,
    },
}  # fmt: skip
SURROGATES = {
    "gspo-kl": {
        "old": True, "ref": True, "importance_sampling_level": "sequence", "epsilon_low": 0.02, "epsilon_high": 0.03,
        "beta": 0.1, "use_bias_correction_kl": True,
    },
    "gspo-token-ace": {
        "old": True, "ref": True, "importance_sampling_level": "sequence_token", "epsilon_low": 0.02, "alpha": 1.0,
    },
    "gspo-on-policy": {"importance_sampling_level": "sequence"},
    "cispo-ace": {"old": True, "ref": True, "surrogate": surrogates.cispo(1.1), "alpha": 0.5},
    "cispo-two-sided-sequence": {
        "old": True, "surrogate": surrogates.cispo_two_sided(0.03, 0.02), "importance_sampling_level": "sequence",
    },
    "dispo-ace": {
        "old": True, "ref": True, "surrogate": surrogates.dispo((0.2, 0.3), (0.1, 0.4)), "alpha": 1.0, "confidence": "old",
    },
    "dppo-tv-ace": {"old": True, "ref": True, "surrogate": surrogates.dppo("tv", 0.002), "alpha": 1.0, "confidence": "old"},
    "dppo-kl": {"old": True, "surrogate": surrogates.dppo("kl", 0.0005, ratio_max=1.1), "beta": 0.1, "ref": True},
    "ipo-kl-against-old": {
        "old": True, "ref": True, "surrogate": surrogates.ipo(0.002), "alpha": 1.0, "confidence": "old", "beta": 0.1,
        "kl_estimator": "k2", "kl_against": "old",
    },
    "reinforce-kl-against-old": {
        "old": True, "surrogate": "reinforce", "beta": 0.1, "use_bias_correction_kl": True, "kl_against": "old",
    },
    "kl-against-old-on-policy": {"beta": 0.1, "kl_estimator": "k1", "kl_against": "old"},
    "sapo-ace": {"old": True, "ref": True, "surrogate": "sapo", "alpha": 1.0},
    "sapo-sequence-kl": {
        "old": True, "ref": True, "surrogate": surrogates.sapo(2.0, 3.0), "importance_sampling_level": "sequence",
        "beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": True,
    },
    "gmpo-ace": {"old": True, "ref": True, "surrogate": surrogates.gmpo(0.2, 0.1), "alpha": 1.0},
    "vespo-ace": {"old": True, "ref": True, "surrogate": "vespo", "alpha": 1.0, "shape": "relu"},
    "reinforce-entropy": {"surrogate": "reinforce", "entropy_coef": 0.1},
    "entropy-kl": {
        "old": True, "ref": True, "entropy_coef": 0.2, "beta": 0.1, "kl_estimator": "k2", "use_bias_correction_kl": True,
    },
    "ace-old-entropy": {"old": True, "ref": True, "entropy_coef": 0.2, "alpha": 1.0, "confidence": "old"},
    "off-policy-mask": {"old": True, "off_policy_mask_threshold": 0.01},
    "off-policy-mask-of-the-sampler": {
        "old": True, "ref": True, "sampling": True, "off_policy_mask_threshold": 0.01, "alpha": 1.0, "beta": 0.1,
    },
    "token-truncate": {"old": True, "sampling": True, "sampling_correction": "token_truncate", "sampling_clip_max": 1.1},
    "token-mask": {
        "old": True, "sampling": True, "sampling_correction": "token_mask", "sampling_clip_max": 1.1, "sampling_clip_min": 0.9,
    },
    "sequence-truncate-ace": {
        "old": True, "ref": True, "sampling": True, "sampling_correction": "sequence_truncate", "alpha": 1.0,
    },
    "sequence-mask-gspo": {
        "old": True, "sampling": True, "sampling_correction": "sequence_mask", "importance_sampling_level": "sequence",
    },
    "token-truncate-gmpo": {"old": True, "sampling": True, "sampling_correction": "token_truncate", "surrogate": "gmpo"},
    "token-mask-vespo": {
        "old": True, "sampling": True, "sampling_correction": "token_mask", "sampling_clip_max": 1.2, "surrogate": "vespo",
    },
}  # fmt: skip
EVERY_METHOD = {**METHODS, **SURROGATES}
COUNTS = {"grpo": 9, "dapo": 400, "dr_grpo": 9, "luspo": 9}


def loss_arguments(batch, method, loss_type, head, *, global_count=False):
    kwargs = {**method, **head_arguments(batch, head), "loss_type": loss_type}
    if kwargs.pop("old", False):
        kwargs["old_per_token_logps"] = batch.old
    if kwargs.pop("ref", False):
        kwargs["ref_per_token_logps"] = batch.ref
    if kwargs.pop("sampling", False):
        kwargs["sampling_per_token_logps"] = batch.sampling
    if kwargs.pop("lm_head_bias", None) is not None:
        kwargs["use_bias"] = True
    if loss_type == "dr_grpo":
        kwargs["max_completion_length"] = 80
    if global_count and loss_type in COUNTS:
        kwargs["num_items_in_batch"] = COUNTS[loss_type]
    return kwargs


def size_of_terms(batch, **arguments):
    """What the terms of a loss add up to when they do not cancel: the scale that its rounding errors have."""
    apart = replace(batch, advantages=batch.advantages.abs())
    with torch.no_grad():
        arguments.pop("use_bias", None)
        given = {"completion_mask": batch.mask, **batch.packing, **arguments}
        return reference_policy_loss(apart.hidden, apart.weight, apart.ids, apart.advantages, **given).loss.abs()


def assert_all_same(got, truth, dtype, label, scale=0.0):
    (out, grads), (true_out, true_grads) = got, truth
    tolerance = TOLERANCE[dtype]
    assert out.loss.ndim == 0
    assert_same(out.loss, true_out.loss, tolerance, f"{label} loss", scale=scale)
    for name, grad, true_grad in zip(("d_hidden", "d_weight", "d_bias"), grads, true_grads, strict=True):
        assert (grad is None) == (true_grad is None), f"{label} {name}"
        if grad is not None:
            assert_same(grad, true_grad, tolerance, f"{label} {name}")
    for name, value in true_out.metrics.items():
        got_value = out.metrics[name]
        assert got_value.ndim == 0, f"{label} {name}"
        assert not got_value.requires_grad, f"{label} {name}"
        assert got_value.item() == pytest.approx(value.item(), rel=10 * tolerance, abs=10 * tolerance), (
            f"{label} {name}"
        )


def dense_batch(dtype=torch.float32):
    """hidden (4, 6, 8), weight (50, 8), ids, advantages and reference of a batch in which every token counts."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 6, 8, generator=g, dtype=dtype), torch.randn(50, 8, generator=g, dtype=dtype)
    ids = torch.randint(50, (4, 6), generator=g)
    return hidden, weight, ids, torch.tensor([1.0, -1.0, 0.5, -0.5]), -3 - torch.rand(4, 6, generator=g)


READY_MADE = [
    surrogates.clip_cov(share=0.2, low=0.05, high=9.0), surrogates.kl_cov(share=0.2), surrogates.fipo(half_life=2.0),
    surrogates.fipo(influence=(0.5, 2.0), delta=1.3, safe_ratio=1.1), rlvr_ops.Real(2),
]  # fmt: skip

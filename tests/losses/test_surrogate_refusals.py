"""What the losses refuse of their surrogates, and what the refusal says to do instead."""

import inspect
import math

import pytest
import torch
from loss_cases import policy_loss, policy_loss_from_logps

import rlvr_ops
from rlvr_ops import surrogates
from rlvr_ops.objectives.names import AGGREGATION

OLD = {"old_per_token_logps": torch.zeros(2, 3)}
SAMPLED = {**OLD, "sampling_per_token_logps": torch.zeros(2, 3)}


def call(**kwargs):
    return policy_loss_from_logps(torch.zeros(2, 3), torch.ones(2), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"surrogate": "sappo"},
            "surrogate must be one of 'ppo_clip', .*or a function itself, got 'sappo'; did you mean 'sapo'",
        ),
        ({"surrogate": "capo"}, "got 'capo'$"),
        ({"surrogate": "gspo"}, "got 'gspo': GSPO is gspo_loss, or importance_sampling_level='sequence'"),
        ({"surrogate": "grpo"}, "got 'grpo': grpo is a loss_type, with surrogate 'ppo_clip'$"),
        ({"surrogate": "geo_mean"}, "got 'geo_mean': that is surrogate='gmpo'"),
        ({"loss_type": "gspo"}, "loss_type must be one of .*GSPO is gspo_loss"),
        ({"loss_type": "vespo"}, "call vespo_loss, or pass surrogate='vespo' with loss_type='dapo'"),
        (
            {"surrogate": surrogates.sapo},
            r"surrogate must be a name, a record or a function, got the class: call Sapo\(\)",
        ),
        ({"surrogate": "reinforce", "importance_sampling_level": "sequence"}, "weight is 1 whatever the ratio"),
        (
            {"surrogate": "gmpo", "top_entropy_quantile": 0.5, "per_token_entropies": torch.zeros(2, 3)},
            "top_entropy_quantile < 1 does not go with surrogate gmpo",
        ),
        (
            {"surrogate": "vespo", "sampling_correction": "token_mask", "confidence": "old", **SAMPLED},
            "confidence='old' does not go with surrogate vespo and a sampling_correction",
        ),
        (
            {"sampling_correction": "token_mask", "sampling_clip_max": "3", **SAMPLED},
            "sampling_clip_max must be a number",
        ),
        (
            {
                "sampling_correction": "token_mask",
                **OLD,
                "sampling_per_token_logps": torch.full((2, 3), -math.inf),
                "validate": True,
            },
            "sampling_per_token_logps must be finite, got -inf",
        ),
        ({"surrogate": 3}, "surrogate must be a name, one of rlvr_ops.surrogates or a function, got 3"),
        ({"surrogate": "sapo", "epsilon_high": 0.3}, "epsilon_high=0.3 belongs to surrogate='ppo_clip'"),
        (
            {"surrogate": "cispo", "delta": 4.0},
            r"delta=4.0 belongs to surrogate='ppo_clip', and .* 'cispo': set that one's numbers by Cispo\(ratio_max=5.0\)",
        ),
        ({"surrogate": "gmpo", "importance_sampling_level": "sequence"}, "does not go with surrogate gmpo"),
        ({"surrogate": "vespo", "importance_sampling_level": "sequence_token"}, "does not go with surrogate vespo"),
        ({"surrogate": "cispo", "importance_sampling_level": "sequence_token"}, "constant to the gradient"),
        ({"importance_sampling_level": "group"}, "importance_sampling_level must be one of 'token'"),
        ({"loss_type": "sequence-mean"}, "loss_type must be one of"),
        (
            {"loss_type": "sapo"},
            "and 'sapo' is a surrogate: call sapo_loss, or pass surrogate='sapo' with loss_type='grpo'",
        ),
        ({"entropy_coef": 0.1}, "per_token_entropies is missing, and entropy_coef needs it"),
        ({"top_entropy_quantile": 0.2}, "per_token_entropies is missing, and top_entropy_quantile needs it"),
        ({"top_entropy_quantile": 0.0}, r"top_entropy_quantile must lie in \(0, 1\]"),
        ({"entropy_coef": -0.1}, "entropy_coef must be >= 0 and finite, got -0.1"),
        ({"entropy_coef": "a"}, "entropy_coef must be a number, got 'a'"),
        ({"off_policy_mask_threshold": -1.0}, "off_policy_mask_threshold must be >= 0 and finite, got -1.0"),
        ({"sampling_correction": "token_truncate", **OLD}, "sampling_per_token_logps is missing"),
        (
            {"sampling_correction": "token_truncate", "sampling_per_token_logps": torch.zeros(2, 3)},
            "old_per_token_logps is missing",
        ),
        ({"sampling_correction": "truncate", **SAMPLED}, "sampling_correction must be one of 'token_truncate'"),
        (SAMPLED, "sampling_per_token_logps is given and nothing reads it"),
        ({"sampling_clip_max": 2.0}, "bounds of a sampling_correction, got none"),
        (
            {"sampling_correction": "token_mask", "sampling_clip_max": 0.0, **SAMPLED},
            "sampling_clip_max must be > 0, got 0.0",
        ),
        (
            {"sampling_correction": "token_mask", "sampling_clip_min": 4.0, **SAMPLED},
            "sampling_clip_min must lie between 0 and sampling_clip_max = 3.0, got 4.0",
        ),
        ({"surrogate": "vespo", "sampling_correction": "sequence_mask", **SAMPLED}, "does not go with surrogate vespo"),
        (
            {"surrogate": "vespo", "sampling_correction": "token_mask", "use_bias_correction_kl": True, **SAMPLED},
            "use_bias_correction_kl does not go with surrogate vespo and a sampling_correction",
        ),
        (
            {"surrogate": "vespo", "sampling_correction": "token_mask", "kl_against": "old", **SAMPLED},
            "kl_against='old' does not go with surrogate vespo and a sampling_correction",
        ),
        ({"kl_against": "sampler"}, "kl_against must be one of 'reference', 'old', got 'sampler'"),
        ({"beta": 0.1, **OLD}, "the KL term needs it: pass it, or beta=0, or kl_against='old'"),
        ({"surrogate": "dro"}, "DRO is surrogate='reinforce' with kl_estimator='k2', kl_against='old'"),
        ({"loss_type": "fipo"}, "FIPO is surrogate='fipo' with loss_type='dapo'"),
        (
            {"surrogate": rlvr_ops.Real(2), "alpha": 1.0, **OLD},
            r"^alpha > 0: surrogate Real",
        ),
        (
            {"surrogate": rlvr_ops.Real(2), "sampling_correction": "token_truncate", **SAMPLED},
            r"^sampling_correction: surrogate Real",
        ),
        (
            {
                "surrogate": rlvr_ops.Real(2),
                "top_entropy_quantile": 0.5,
                "per_token_entropies": torch.zeros(2, 3),
                **OLD,
            },
            r"^top_entropy_quantile < 1: surrogate Real",
        ),
        ({"surrogate": "cipso"}, "got 'cipso'; did you mean 'cispo'"),
        ({"surrogate": rlvr_ops.Real(3), **OLD}, "group_size must divide the 2 rollouts of the batch, got 3"),
        (
            {"sampling_correction": "token_mask", **OLD, "sampling_per_token_logps": torch.zeros(2, 4)},
            r"sampling_per_token_logps must have shape \(2, 3\) like per_token_logps, got \(2, 4\)",
        ),
        (
            {"entropy_coef": 0.1, "per_token_entropies": torch.zeros(3)},
            r"per_token_entropies must have shape \(2, 3\) like per_token_logps, got \(3,\)",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(**kwargs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: surrogates.cispo(0.0), "ratio_max must be > 0 and finite, got 0.0"),
        (lambda: surrogates.cispo_two_sided(-1.0), "epsilon_low must be > 0 and finite, got -1.0"),
        (lambda: surrogates.dispo(positive=(0.2,)), r"positive must be \(low, high\), both >= 0 and finite"),
        (lambda: surrogates.dispo(positive=0.2), r"positive must be \(low, high\), both >= 0 and finite"),
        (lambda: surrogates.ppo_clip(0.2, 0.28, 1.2), r"delta must be > 1 \+ epsilon_high = 1.28 or None, got 1.2"),
        (lambda: surrogates.dispo(negative=(0.2, math.inf)), r"negative must be \(low, high\), both >= 0 and finite"),
        (lambda: surrogates.ipo(0.0), "threshold must be > 0 and finite, got 0.0"),
        (lambda: surrogates.clip_cov(low=5.0), "low must be below high = 5.0, got 5.0"),
        (lambda: surrogates.clip_cov(share=0.0), "share must be > 0 and finite, got 0.0"),
        (lambda: surrogates.clip_cov(share=2.0), "share must be at most 1, the share of all tokens, got 2.0"),
        (lambda: surrogates.kl_cov(share=2.0), "share must be at most 1, the share of all tokens, got 2.0"),
        (lambda: surrogates.clip_cov(low="a"), "low must be a number, got 'a'"),
        (lambda: surrogates.clip_cov(high=None), "high must be a number, got None"),
        (lambda: surrogates.clip_cov(seed=1.5), "seed must be an integer, got 1.5"),
        (
            lambda: surrogates.fipo(influence=1.2),
            r"influence must be \(low, high\) with 0 <= low <= high, got \(1.2,\)",
        ),
        (
            lambda: surrogates.fipo(influence="ab"),
            r"influence must be \(low, high\) with 0 <= low <= high, got \('ab',\)",
        ),
        (lambda: surrogates.fipo(influence=("a", "b")), r"influence must be \(low, high\) with 0 <= low <= high, got"),
        (lambda: surrogates.kl_cov(coef=-1.0), "coef must be > 0 and finite, got -1.0"),
        (lambda: surrogates.fipo(influence=(1.2, 1.0)), r"influence must be \(low, high\) with 0 <= low <= high"),
        (lambda: surrogates.fipo(delta=1.0), r"delta must be > 1 \+ epsilon_high"),
        (lambda: rlvr_ops.Real(1), "group_size must be an integer of 2 or more, got 1"),
        (lambda: surrogates.dppo("js"), "divergence must be one of 'tv', 'kl', got 'js'"),
        (lambda: surrogates.dppo(threshold=0.0), "threshold must be > 0 and finite, got 0.0"),
        (lambda: surrogates.dppo(ratio_max=-1.0), "ratio_max must be > 0 and finite, got -1.0"),
        (
            lambda: rlvr_ops.Objective(rlvr_ops.Dppo(), importance_sampling_level="sequence"),
            r"does not go with a surrogate whose trust region is each token's own \(dppo\): leave it at 'token'",
        ),
        (lambda: surrogates.sapo(tau_negative=0), "tau_negative must be > 0 and finite, got 0"),
        (lambda: surrogates.gmpo("a"), "epsilon_low must be a number, got 'a'"),
        (lambda: surrogates.vespo(k_negative=math.inf), "k_negative must be > 0 and finite, got inf"),
        (lambda: surrogates.ppo_clip(0.2, math.nan), "epsilon_high must be > 0 and finite, got nan"),
        (lambda: surrogates.dispo(positive=(0.2, math.nan)), r"positive must be \(low, high\), both >= 0 and finite"),
        (lambda: rlvr_ops.Objective("clip"), r"surrogate must be a record such as Clip\(\), or a function, got 'clip'"),
        (lambda: rlvr_ops.Objective(rlvr_ops.Clip), "surrogate must be a record such as Clip"),
        (lambda: rlvr_ops.Objective(rlvr_ops.Clip(), ace=1.0), "ace must be of type Ace, got float"),
    ],
)
def test_a_surrogates_numbers_are_checked(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_single_pass_cannot_know_every_entropy_first():
    with pytest.raises(ValueError, match="does not go with top_entropy_quantile < 1"):
        policy_loss(
            torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.long),
            torch.ones(2), top_entropy_quantile=0.5, schedule="single_pass",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "keyword"),
    [("gspo", "delta"), ("vespo", "importance_sampling_level"), ("cispo", "epsilon_high"), ("cispo", "surrogate"),
     ("sapo", "tau_positive"), ("bnpo", "num_items_in_batch"), ("grpo", "max_completion_length")],
)  # fmt: skip
def test_a_named_loss_takes_the_keywords_that_it_reads_and_no_others(name, keyword):
    for loss in (getattr(rlvr_ops, f"{name}_loss"), getattr(rlvr_ops, f"{name}_loss_from_logps")):
        assert keyword not in inspect.signature(loss).parameters
        with pytest.raises(TypeError, match=rf"{name}_loss.*\(\) got an unexpected keyword argument '{keyword}'"):
            loss(torch.zeros(2, 3), torch.ones(2), **{keyword: 1.0})


@pytest.mark.parametrize("name", AGGREGATION)
def test_the_aggregation_that_is_named_with_a_surrogate_is_its_presets(name):
    preset = getattr(rlvr_ops, f"{name.removesuffix('_two_sided')}_loss")
    assert inspect.signature(preset).parameters["loss_type"].default == AGGREGATION[name]


def test_the_verb_refuses_what_is_no_record_by_name():
    hidden, weight, ids, advantages = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3).long(), torch.ones(2)
    head, rollouts, objective = (
        rlvr_ops.Head(weight),
        rlvr_ops.Rollouts(ids, advantages),
        rlvr_ops.Objective(rlvr_ops.Clip()),
    )
    for arguments, message in (
        (
            (weight, rollouts, objective),
            "head must be of type Head, got Tensor: .* flat keywords are those of ace_loss",
        ),
        ((head, ids, objective), "rollouts must be of type Rollouts, got Tensor"),
        ((head, rollouts, "grpo"), "objective must be of type Objective, got str"),
        ((head, rollouts, rlvr_ops.Objective), "objective must be of type Objective, got the class Objective"),
        ((head, rollouts, objective, {}), "plan must be of type Plan, got dict"),
    ):
        with pytest.raises(TypeError, match=message):
            rlvr_ops.policy_loss(hidden, *arguments)
    for make, message in (
        (lambda: rlvr_ops.Plan(workspace_bytes=1e9), "workspace_bytes must be of type int, got float"),
        (lambda: rlvr_ops.Plan(with_entropy="no"), "with_entropy must be of type bool, got str"),
        (
            lambda: rlvr_ops.Objective(rlvr_ops.Clip(), sampling="token_mask"),
            "sampling must be of type SamplingCorrection",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            make()
    with pytest.raises(TypeError, match="rollouts must be of type Rollouts, got Tensor"):
        rlvr_ops.policy_loss_from_logps(torch.zeros(2, 3), advantages, objective)


def test_a_rollout_that_is_too_long_is_what_the_error_is_about():
    hidden, weight = torch.randn(2, 8, 4), torch.randn(16, 4).requires_grad_()
    rollouts = rlvr_ops.Rollouts(
        torch.zeros(2, 8, dtype=torch.int64), torch.tensor([1.0, -1.0]), old_per_token_logps=torch.full((2, 8), -3.0),
        sampling_per_token_logps=torch.full((2, 8), -3.0),
    )  # fmt: skip
    objective = rlvr_ops.Objective(rlvr_ops.Vespo(), sampling=rlvr_ops.SamplingCorrection("token_mask"))
    plan = rlvr_ops.Plan("single_pass", workspace_bytes=16 * 4 * 4)
    with pytest.raises(ValueError, match="needs each rollout in one chunk"):
        rlvr_ops.policy_loss(hidden, rlvr_ops.Head(weight), rollouts, objective, plan)


@pytest.mark.parametrize("bounds", [("a", 2), (0.1,), (0.1, float("inf"))])
def test_bounds_that_are_no_pair_of_numbers_are_named(bounds):
    with pytest.raises(ValueError, match=r"positive must be \(low, high\)"):
        rlvr_ops.Dispo(bounds)


def test_a_temperature_is_checked_when_the_head_is_made():
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got -1"):
        rlvr_ops.Head(torch.zeros(4, 2), temperature=-1)


def test_the_surrogates_can_be_imported_as_a_module():
    from rlvr_ops.surrogates import sapo

    assert sapo is rlvr_ops.Sapo

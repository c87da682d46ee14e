"""The slips of a first day, and the messages that lead out of them."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from loss_cases import dense_batch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import rlvr_ops
from rlvr_ops import KL, Clip, Head, Objective, Plan, Rollouts

HIDDEN, WEIGHT, IDS, ADVANTAGES, REF = dense_batch()
LINEAR = nn.Linear(WEIGHT.shape[1], WEIGHT.shape[0], bias=False)
MODEL = LlamaForCausalLM(
    LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_attention_heads=1, num_hidden_layers=1)
)


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        (
            lambda: rlvr_ops.ace_loss(HIDDEN, LINEAR, IDS, ADVANTAGES, ref_per_token_logps=REF),
            r"lm_head_weight must be a torch.Tensor, got Linear: Head.of\(it\) has its weight and its bias",
        ),
        (lambda: rlvr_ops.token_logps(HIDDEN, LINEAR, IDS), r"got Linear: Head.of\(it\) has its weight and its bias"),
        (
            lambda: Head(LINEAR),
            r"lm_head_weight must be a torch.Tensor, got Linear: Head.of\(it\) has its weight and its bias",
        ),
        (
            lambda: rlvr_ops.grpo_loss(HIDDEN, MODEL, IDS, ADVANTAGES),
            r"lm_head_weight must be a torch.Tensor, got LlamaForCausalLM: Head.from_model\(it\) is its head",
        ),
        (
            lambda: rlvr_ops.ace_loss(
                HIDDEN, WEIGHT, IDS, ADVANTAGES, ref_per_token_logps=rlvr_ops.token_logps(HIDDEN, WEIGHT, IDS)
            ),
            "ref_per_token_logps must be a torch.Tensor, got TokenScores: pass its .logps",
        ),
        (lambda: rlvr_ops.token_logps(nn.Sequential(LINEAR), WEIGHT, IDS), "hidden_states .*, got Sequential$"),
        (lambda: Head.of(WEIGHT), "lm_head must be an nn.Linear .*, got Tensor: a tensor goes to Head itself"),
        (lambda: Head.of(nn.Sequential(LINEAR)), "got Sequential: pass the model's output layer"),
    ],
)
def test_a_thing_in_the_place_of_a_tensor_is_told_where_the_tensor_is(slip, message):
    with pytest.raises(TypeError, match=message):
        slip()


@pytest.mark.parametrize("name", ["old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"])
def test_validate_tells_probabilities_from_log_probabilities(name):
    logps = {"ref_per_token_logps": REF, "old_per_token_logps": REF, "sampling_per_token_logps": REF}
    mask = torch.ones_like(REF)
    mask[0, 0] = 0
    given = {**logps, name: REF.exp(), "completion_mask": mask, "validate": True}
    given["sampling_correction"] = "token_truncate"
    message = rf"{name} must be at most 0, got .* at \(0, 1\): give log-probabilities, not probabilities"
    with pytest.raises(ValueError, match=message):
        rlvr_ops.ace_loss(HIDDEN, WEIGHT, IDS, ADVANTAGES, **given)
    with pytest.raises(ValueError, match=message):
        rlvr_ops.ace_loss_from_logps(REF, ADVANTAGES, **given)
    with pytest.raises(ValueError, match="per_token_logps must be at most 0"):
        rlvr_ops.grpo_loss_from_logps(REF.exp(), ADVANTAGES, validate=True)
    rlvr_ops.ace_loss(HIDDEN, WEIGHT, IDS, ADVANTAGES, **given | {name: REF})


def test_validate_lets_rounding_and_masked_values_pass():
    logps, mask = REF.clone(), torch.ones_like(REF)
    logps[0, 0], logps[0, 1], mask[0, 1] = 5e-4, 7.0, 0
    given = {"completion_mask": mask, "validate": True}
    rlvr_ops.grpo_loss_from_logps(logps, ADVANTAGES, old_per_token_logps=logps, **given)
    rlvr_ops.grpo_loss(HIDDEN, WEIGHT, IDS, ADVANTAGES, old_per_token_logps=logps, **given)


def test_validate_names_a_mask_that_is_nan_and_takes_any_other():
    mask = torch.ones_like(REF)
    mask[1, 2] = float("nan")
    with pytest.raises(ValueError, match="completion_mask must not be NaN"):
        rlvr_ops.grpo_loss(HIDDEN, WEIGHT, IDS, ADVANTAGES, completion_mask=mask, validate=True)
    for other in (mask.nan_to_num(float("inf")), mask.nan_to_num(1) > 0, mask.nan_to_num(1).int()):
        rlvr_ops.grpo_loss(HIDDEN, WEIGHT, IDS, ADVANTAGES, completion_mask=other, validate=True)


def test_a_number_in_the_place_of_a_name_gets_no_spelling_hint():
    with pytest.raises(ValueError, match=r"kl_estimator must be one of 'k1', 'k2', 'k3', got 0.1$"):
        KL(0.1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"hidden_states": HIDDEN[..., :0], "lm_head_weight": WEIGHT[:, :0]},
            ValueError,
            "hidden_states must have H > 0",
        ),
        (
            {"surrogate": lambda logps, rows: torch.complex(logps, -rows.advantages)},
            TypeError,
            "surrogate must return floating-point losses, got torch.complex64",
        ),
        ({"validate": SimpleNamespace()}, TypeError, "validate must be of type bool, got SimpleNamespace"),
        ({"validate": type("bool", (), {})()}, TypeError, "validate must be of type bool, got .*test_slips.bool"),
    ],
)
def test_what_would_end_in_nan_zero_or_a_raw_error_is_named(changes, error, message):
    given = {
        "hidden_states": HIDDEN,
        "lm_head_weight": WEIGHT,
        "completion_ids": IDS,
        "advantages": ADVANTAGES,
        "alpha": 0.0,
    }
    with pytest.raises(error, match=message):
        rlvr_ops.ace_loss(**given | changes)


@pytest.mark.interpret
def test_a_form_without_a_triton_branch_is_refused_by_the_kernel():
    @dataclass(frozen=True)
    class Mine(rlvr_ops.surrogates.Surrogate):
        form = "mine"
        numbers = ((0.0, 0.0), (0.0, 0.0))

    arguments = HIDDEN, Head(WEIGHT), Rollouts(IDS, ADVANTAGES), Objective(Mine()), Plan(backend="triton")
    with pytest.raises(Exception, match="surrogate_kernel has no branch for this form"):
        rlvr_ops.policy_loss(*arguments)
    rlvr_ops.policy_loss(*arguments[:3], Objective(Clip()), arguments[4])

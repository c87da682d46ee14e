"""Every bad input is refused with a message that names the argument, what came and what is wanted."""

import re

import pytest
import torch
from loss_cases import policy_loss_from_logps

import rlvr_ops

B, T, H, V = 4, 6, 5, 17
NAN = float("nan")


def good(**changes):
    """The arguments of a call that works, with changes; the value `...` leaves one out."""
    arguments = {
        "hidden_states": torch.randn(B, T, H),
        "lm_head_weight": torch.randn(V, H),
        "completion_ids": torch.randint(V, (B, T)),
        "advantages": torch.randn(B),
        "ref_per_token_logps": -torch.rand(B, T),
        "old_per_token_logps": -torch.rand(B, T),
        "completion_mask": torch.ones(B, T),
    } | changes
    return {name: value for name, value in arguments.items() if value is not ...}


def good_packed(**changes):
    arguments = {
        "hidden_states": torch.randn(9, H),
        "completion_ids": torch.randint(V, (9,)),
        "ref_per_token_logps": -torch.rand(9),
        "old_per_token_logps": -torch.rand(9),
        "completion_mask": torch.ones(9),
        "advantages": torch.randn(3),
        "cu_seqlens": torch.tensor([0, 4, 4, 9]),
    }
    return good(**(arguments | changes))


def refused(message, arguments, error=ValueError, loss=rlvr_ops.ace_loss):
    with pytest.raises(error, match=message):
        loss(**arguments)


def test_the_good_calls_work():
    assert torch.isfinite(rlvr_ops.ace_loss(**good()).loss)
    assert torch.isfinite(rlvr_ops.ace_loss(**good_packed()).loss)


def exactly(text):
    return re.escape(text)


SHAPES = {
    "hidden_states of rank 1": (
        {"hidden_states": torch.zeros(H)},
        "hidden_states must have shape (B, T, H), or (N, H) with cu_seqlens, got (5,)",
    ),
    "hidden_states of rank 4": (
        {"hidden_states": torch.zeros(1, B, T, H)},
        "hidden_states must have shape (B, T, H), or (N, H) with cu_seqlens, got (1, 4, 6, 5)",
    ),
    "H that does not fit": (
        {"lm_head_weight": torch.zeros(V, 8)},
        "lm_head_weight must have shape (V, H) with H = 5 like hidden_states, got (17, 8)",
    ),
    "a transposed weight": (
        {"lm_head_weight": torch.zeros(H, V)},
        "lm_head_weight must have shape (V, H) with H = 5 like hidden_states, got (5, 17)",
    ),
    "a vocabulary of nothing": (
        {"lm_head_weight": torch.zeros(0, H)},
        "lm_head_weight must have a row for each of V > 0",
    ),
    "a weight of rank 1": ({"lm_head_weight": torch.zeros(H)}, "lm_head_weight must have shape (V, H)"),
    "a bias of another size": (
        {"lm_head_bias": torch.zeros(V + 1)},
        "lm_head_bias must have shape (V,) = (17,), got (18,)",
    ),
    "ids with the prompt": (
        {"completion_ids": torch.zeros(B, T + 1, dtype=torch.long)},
        "completion_ids must have shape (4, 6) like hidden_states without H, got (4, 7)",
    ),
    "a mask with the prompt": (
        {"completion_mask": torch.ones(B, T + 1)},
        "completion_mask must have shape (B, T) = (4, 6) like completion_ids, got (4, 7): drop the prompt columns",
    ),
    "a mask of the wrong batch": (
        {"completion_mask": torch.ones(B - 1, T)},
        "completion_mask must have shape (B, T) = (4, 6) like completion_ids, got (3, 6)",
    ),
    "advantages of another batch": (
        {"advantages": torch.zeros(B + 1)},
        "advantages must have one value per rollout (B,) = (4,) or one per token (B, T) = (4, 6), got (5,)",
    ),
    "advantages as a column": ({"advantages": torch.zeros(B, 1)}, "advantages must have one value per rollout (B,)"),
    "old of another length": (
        {"old_per_token_logps": torch.zeros(B, T - 1)},
        "old_per_token_logps must have shape (4, 6) like completion_ids, got (4, 5)",
    ),
    "ref of another length": (
        {"ref_per_token_logps": torch.zeros(B)},
        "ref_per_token_logps must have shape (4, 6) like completion_ids, got (4,)",
    ),
    "temperatures of another batch": (
        {"temperature": torch.ones(B + 2)},
        "temperature must have one value per rollout (B,) = (4,) or one per token (B, T) = (4, 6), got (6,)",
    ),
    "cu_seqlens with a padded batch": (
        {"cu_seqlens": torch.tensor([0, 4])},
        "cu_seqlens goes with packed rows (N,), but completion_ids has shape (B, T) = (4, 6)",
    ),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_wrong_shape_is_named(case):
    changes, message = SHAPES[case]
    refused(exactly(message), good(**changes))


PACKED = {
    "no cu_seqlens": ({"cu_seqlens": None}, "cu_seqlens is needed for packed rows (N,) = (9,)"),
    "an end before N": (
        {"cu_seqlens": torch.tensor([0, 4, 8])},
        "cu_seqlens must begin at 0 and end at N = 9, got 0 and 8",
    ),
    "an end after N": (
        {"cu_seqlens": torch.tensor([0, 4, 10])},
        "cu_seqlens must begin at 0 and end at N = 9, got 0 and 10",
    ),
    "no beginning": ({"cu_seqlens": torch.tensor([4, 9])}, "cu_seqlens must begin at 0 and end at N = 9, got 4 and 9"),
    "decreasing": (
        {"cu_seqlens": torch.tensor([0, 5, 4, 9])},
        "cu_seqlens must not decrease, got [0, 5, 4, 9]",
    ),
    "rank 2": ({"cu_seqlens": torch.tensor([[0, 9]])}, "cu_seqlens must have shape (B + 1,) and dtype int32 or int64"),
    "a float dtype": ({"cu_seqlens": torch.tensor([0.0, 4.0, 9.0])}, "got (3,) torch.float32"),
    "a mask of the wrong length": (
        {"completion_mask": torch.ones(10)},
        "completion_mask must have shape (N,) = (9,) like completion_ids, got (10,)",
    ),
    "advantages of another batch": (
        {"advantages": torch.zeros(4)},
        "advantages must have one value per rollout (B,) = (3,) or one per row (N,) = (9,), got (4,)",
    ),
    "dr_grpo without its length": (
        {"loss_type": "dr_grpo"},
        "max_completion_length is needed for loss_type='dr_grpo' on packed rows",
    ),
}


@pytest.mark.parametrize("case", PACKED)
def test_bad_packing_is_named(case):
    changes, message = PACKED[case]
    refused(exactly(message), good_packed(**changes))


def test_boundaries_that_are_no_tensor_are_named():
    refused(
        exactly("cu_seqlens must be a torch.Tensor, got list"), good_packed(cu_seqlens=[0, 4, 4, 9]), error=TypeError
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(B, T, H, dtype=torch.long)}, "hidden_states must have a floating dtype"),
        (
            {"lm_head_weight": torch.zeros(V, H, dtype=torch.int8)},
            "lm_head_weight must have a floating dtype, got .*int8",
        ),
        ({"lm_head_bias": torch.zeros(V, dtype=torch.long)}, "lm_head_bias must have a floating dtype"),
        ({"completion_ids": torch.zeros(B, T)}, "completion_ids must have dtype int64 or int32, got torch.float32"),
        ({"advantages": torch.zeros(B, dtype=torch.long)}, "advantages must have a floating dtype, got torch.int64"),
        (
            {"old_per_token_logps": torch.zeros(B, T, dtype=torch.bool)},
            "old_per_token_logps must have a floating dtype",
        ),
        ({"ref_per_token_logps": [[0.0]]}, "ref_per_token_logps must be a torch.Tensor, got list"),
        ({"completion_mask": [1, 1]}, "completion_mask must be a torch.Tensor, got list"),
        ({"hidden_states": None}, "hidden_states must be a torch.Tensor, got NoneType"),
    ],
)
def test_a_wrong_type_is_named(changes, message):
    refused(message, good(**changes), TypeError)


@pytest.mark.parametrize(
    "name",
    ["lm_head_weight", "completion_ids", "advantages", "completion_mask", "old_per_token_logps", "ref_per_token_logps"],
)
def test_another_device_is_named(name):
    elsewhere = good()[name].to("meta")
    refused(f"{name} must be on cpu like the other tensors, got meta", good(**{name: elsewhere}))


@pytest.mark.parametrize("bad", [-1, V, -100])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(bad):
    ids = torch.zeros(B, T, dtype=torch.long)
    ids[1, 2] = bad
    message = exactly(f"completion_ids must lie in [0, V) = [0, 17) where completion_mask is 1, got {bad} at (1, 2)")
    refused(message, good(completion_ids=ids))
    mask = torch.ones(B, T)
    mask[1, 2] = 0
    rlvr_ops.ace_loss(**good(completion_ids=ids, completion_mask=mask))
    with pytest.raises(ValueError, match=message):
        rlvr_ops.token_logps(torch.randn(B, T, H), torch.randn(V, H), ids)


HYPER = [
    ({"alpha": -0.5}, r"alpha must be >= 0 and finite, got -0\.5"),
    ({"alpha": NAN}, "alpha must be >= 0 and finite, got nan"),
    ({"beta": -1.0}, r"beta must be >= 0 and finite, got -1\.0"),
    ({"epsilon_low": 0.0}, r"epsilon_low must be > 0 and finite, got 0\.0"),
    ({"epsilon_low": -0.2}, "epsilon_low must be > 0"),
    ({"epsilon_high": 0.0}, r"epsilon_high must be > 0 and finite, got 0\.0"),
    ({"epsilon_low": 1.5}, "epsilon_low must be <= 1"),
    ({"delta": 1.1}, r"delta must be > 1 \+ epsilon_high = 1\.2 or None, got 1\.1"),
    ({"loss_type": "dr-grpo"}, "loss_type must be one of .*, got 'dr-grpo'.*'dr_grpo'"),
    ({"loss_type": "gropo"}, "loss_type must be one of .*, got 'gropo'; did you mean 'grpo'"),
    ({"confidence": "new"}, "confidence must be one of 'current', 'old', got 'new'"),
    ({"confidence_reduction": "avg"}, "confidence_reduction must be one of 'mean', 'sum', got 'avg'"),
    ({"shape": "softmax"}, "shape must be one of 'softplus', 'relu', got 'softmax'; did you mean 'softplus'"),
    ({"kl_estimator": "k4"}, "kl_estimator must be one of 'k1', 'k2', 'k3', got 'k4'"),
    ({"loss_type": "bnpo", "num_items_in_batch": 5}, "num_items_in_batch does not go with loss_type='bnpo'"),
    ({"num_items_in_batch": 0}, "num_items_in_batch must be > 0, the rollouts of the global batch, got 0"),
    ({"num_items_in_batch": torch.ones(4)}, r"num_items_in_batch must be one number, got a tensor of shape \(4,\)"),
    ({"loss_type": "dr_grpo", "max_completion_length": 0}, "max_completion_length must be > 0, got 0"),
]


@pytest.mark.parametrize(("changes", "message"), HYPER)
def test_a_bad_hyper_parameter_is_named(changes, message):
    refused(message, good(**changes))
    logps = {name: good()[name] for name in ("advantages", "ref_per_token_logps")}
    refused(message, {"per_token_logps": torch.randn(B, T), **logps, **changes}, loss=rlvr_ops.ace_loss_from_logps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be > 0 and finite, got 0\.0"),
        ({"temperature": torch.tensor([1.0, 1.0, 0.0, 1.0])}, r"temperature must be > 0 and finite, got 0\.0"),
        ({"softcap": 0.0}, r"softcap must be > 0 and finite, or None, got 0\.0"),
        ({"softcap": float("inf")}, "softcap must be > 0 and finite, or None, got inf"),
        ({"logit_scale": 0.0}, r"logit_scale must be a finite number other than 0, got 0\.0"),
        ({"logit_scale": float("inf")}, "logit_scale must be a finite number other than 0, got inf"),
        ({"schedule": "one_pass"}, "schedule must be one of .*, got 'one_pass'; did you mean"),
        ({"backend": "cuda"}, "backend must be one of .*, got 'cuda'"),
        ({"workspace_bytes": 0, "with_entropy": True}, "workspace_bytes must be at least 4, one logit, got 0"),
        ({"workspace_bytes": -1}, "workspace_bytes must be at least 4"),
    ],
)
def test_a_bad_setting_is_named(changes, message):
    for schedule in ("auto", "two_pass"):
        refused(message, good(**{"schedule": schedule, **changes}))


@pytest.mark.parametrize("grad", [True, False])
def test_a_workspace_that_holds_no_logit_is_refused_with_and_without_gradient(grad):
    hidden = torch.randn(B, T, H, requires_grad=grad)
    for loss in (rlvr_ops.ace_loss, rlvr_ops.token_logps):
        arguments = good(hidden_states=hidden, workspace_bytes=0)
        if loss is rlvr_ops.token_logps:
            arguments = {
                n: arguments[n] for n in ("hidden_states", "lm_head_weight", "completion_ids", "workspace_bytes")
            }
        refused("workspace_bytes must be at least 4, one logit, got 0", arguments, loss=loss)


def test_a_way_out_that_was_taken_in_part_is_told_the_rest():
    given = good(schedule="single_pass", workspace_bytes=12 * V, confidence="old", old_per_token_logps=None)
    refused("confidence='old' with old_per_token_logps, or schedule='two_pass'", given)


def test_a_missing_reference_is_named_with_the_way_out():
    none = good(ref_per_token_logps=None)
    refused("ref_per_token_logps is missing, and ACE compares the policy with it: pass it, or alpha=0", none)
    refused(
        "ref_per_token_logps is missing, and the KL term needs it: pass it, or beta=0", {**none, "alpha": 0, "beta": 1}
    )
    rlvr_ops.ace_loss(**none, alpha=0.0)
    with pytest.raises(ValueError, match="ref_per_token_logps is missing"):
        rlvr_ops.ace_loss_from_logps(torch.zeros(B, T), torch.zeros(B))
    with pytest.raises(TypeError, match=r"ref_per_token_logps must be a torch\.Tensor, got NoneType"):
        rlvr_ops.ace_advantages(torch.zeros(B), torch.zeros(B, T), None)


def test_a_rollout_longer_than_the_chunk_is_refused_where_single_pass_is_forced():
    row = 4 * V
    message = exactly(
        f"schedule='single_pass' needs each rollout in one chunk, and workspace_bytes={row * 3} holds 3 rows but the "
        f"longest rollout has 6: give workspace_bytes >= {row * 6}, confidence='old', or schedule='two_pass'"
    )
    refused(message, good(schedule="single_pass", workspace_bytes=row * 3))
    for way_out in (
        {"workspace_bytes": row * 6},
        {"confidence": "old"},
        {"schedule": "two_pass"},
        {"schedule": "auto"},
    ):
        rlvr_ops.ace_loss(**good(**{"schedule": "single_pass", "workspace_bytes": row * 3, **way_out}))
    refused(
        f"workspace_bytes must hold one row of logits for schedule='single_pass', {row} bytes, got {row - 1}",
        good(schedule="single_pass", workspace_bytes=row - 1, alpha=0.0),
    )


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("hidden_states", (1, 2, 3)),
        ("lm_head_weight", (7, 1)),
        ("lm_head_bias", (3,)),
        ("advantages", (2,)),
        ("old_per_token_logps", (0, 5)),
        ("ref_per_token_logps", (3, 0)),
    ],
)
def test_validate_names_what_is_not_finite_and_where(name, place, bad):
    arguments = good(lm_head_bias=torch.zeros(V))
    arguments[name][place] = bad
    refused(exactly(f"{name} must be finite, got {bad} at {place}"), {**arguments, "validate": True})
    if arguments[name].shape[:2] == (B, T):
        arguments["completion_mask"][place[:2]] = 0
        rlvr_ops.ace_loss(**arguments, validate=True)


def test_the_losses_from_log_probabilities_name_their_arguments():
    logps, advantages = torch.randn(B, T), torch.randn(B)
    loss = policy_loss_from_logps

    def check(message, *args, error=ValueError, **kwargs):
        with pytest.raises(error, match=message):
            loss(*args, **kwargs)

    check(
        r"per_token_logps must have shape \(B, T\), or \(N,\) with cu_seqlens, got \(4, 6, 1\)",
        logps[..., None],
        advantages,
    )
    check("per_token_logps must have a floating dtype", logps.long(), advantages, error=TypeError)
    check("cu_seqlens is needed for packed rows", logps[0], advantages)
    mask = torch.ones(B, T + 1)
    check(
        r"completion_mask must .* like per_token_logps, got \(4, 7\): drop the prompt",
        logps,
        advantages,
        completion_mask=mask,
    )
    old = torch.zeros(B)
    check(
        r"old_per_token_logps must have shape \(4, 6\) like per_token_logps", logps, advantages, old_per_token_logps=old
    )
    check(r"per_token_logps must be finite, got nan at \(0, 0\)", logps * NAN, advantages, validate=True)
    check("advantages must be on cpu like the other tensors, got meta", logps, advantages.to("meta"))


def test_the_presets_refuse_what_they_fix():
    with pytest.raises(TypeError, match=r"grpo_loss\(\) got an unexpected keyword argument 'alpha'"):
        rlvr_ops.grpo_loss(**good(), alpha=1.0)
    with pytest.raises(TypeError, match=r"dapo_loss\(\) got an unexpected keyword argument 'loss_type'"):
        rlvr_ops.dapo_loss(**good(), loss_type="grpo")
    with pytest.raises(TypeError, match=r"ace_loss\(\) got an unexpected keyword argument 'alfa'"):
        rlvr_ops.ace_loss(**good(), alfa=1.0)


def test_token_logps_names_its_arguments():
    hidden, weight, ids = torch.randn(B, T, H), torch.randn(V, H), torch.randint(V, (B, T))
    with pytest.raises(ValueError, match=r"completion_mask must have shape \(B, T\) = \(4, 6\)"):
        rlvr_ops.token_logps(hidden, weight, ids, completion_mask=torch.ones(B, T + 1))
    with pytest.raises(ValueError, match="hidden_states must be finite, got nan"):
        rlvr_ops.token_logps(hidden * NAN, weight, ids, validate=True)


def test_a_sharded_head_is_refused_with_the_way_out():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            raise AssertionError("nobody asked for a collective")

    weight = torch.randn(V, H).as_subclass(Sharded)
    with pytest.raises(
        TypeError,
        match=r"lm_head_weight must be a whole tensor, got a sharded DTensor: pass lm_head_weight\.full_tensor",
    ):
        rlvr_ops.ace_loss(**good(lm_head_weight=weight))

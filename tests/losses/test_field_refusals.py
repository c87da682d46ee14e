"""What public bug reports of this field gave the losses that no loss can take: refused by name, or taken as it is."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from loss_cases import dense_batch, policy_loss
from torch._subclasses.fake_tensor import FakeTensorMode

import rlvr_ops
from rlvr_ops import Head

B, T, H, V = 4, 6, 8, 50
SCHEDULES = ("single_pass", "two_pass")


# Forward mode


def forward_modes():
    hidden, weight, ids, advantages, ref = dense_batch()
    head = hidden, weight, ids
    return {
        "token_logps": (lambda x: rlvr_ops.token_logps(x, *head[1:]).logps, hidden),
        "token_logps by weight": (lambda w: rlvr_ops.token_logps(hidden, w, ids).logps, weight),
        "ace_loss": (lambda x: rlvr_ops.ace_loss(x, *head[1:], advantages, ref_per_token_logps=ref).loss, hidden),
        "grpo_loss by bias": (lambda b: rlvr_ops.grpo_loss(*head, advantages, lm_head_bias=b).loss, torch.zeros(V)),
        "temperature": (lambda t: rlvr_ops.token_logps(*head, temperature=t).logps, torch.ones(B)),
        "temperature of a loss": (lambda t: rlvr_ops.grpo_loss(*head, advantages, temperature=t).loss, torch.ones(B)),
        "advantages": (lambda a: rlvr_ops.grpo_loss(*head, a).loss, advantages),
        "advantages of log-probabilities": (lambda a: rlvr_ops.grpo_loss_from_logps(ref, a).loss, advantages),
        "old log-probabilities": (
            lambda old: rlvr_ops.grpo_loss_from_logps(ref, advantages, old_per_token_logps=old).loss,
            ref,
        ),
        "a function": (
            lambda x: rlvr_ops.ace_loss(x, *head[1:], advantages, alpha=0.0, surrogate=lambda logp, rows: -logp).loss,
            hidden,
        ),
        "grpo_loss_from_logps": (lambda x: rlvr_ops.grpo_loss_from_logps(x, advantages).loss, ref),
        "entropies": (
            lambda e: rlvr_ops.grpo_loss_from_logps(ref, advantages, per_token_entropies=e, entropy_coef=0.1).loss,
            -ref,
        ),
    }


@pytest.mark.parametrize("case", forward_modes())
@pytest.mark.parametrize("mode", ["jvp", "jacfwd", "linearize", "dual"])
def test_a_forward_mode_tangent_is_refused_by_name_and_never_zero(case, mode):
    function, x = forward_modes()[case]

    def differentiate():
        if mode == "dual":
            with forward_ad.dual_level():
                return function(forward_ad.make_dual(x, torch.ones_like(x)))
        if mode == "jvp":
            return torch.func.jvp(function, (x,), (torch.ones_like(x),))
        return torch.func.linearize(function, x) if mode == "linearize" else torch.func.jacfwd(function)(x)

    with pytest.raises(NotImplementedError, match="has a forward-mode tangent: only reverse mode"):
        differentiate()


# Tensors that are not what they seem


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("packed_rows", [False, True])
def test_tensors_made_in_inference_mode_work(schedule, packed_rows):
    hidden, weight, ids, advantages, ref = dense_batch()
    with torch.inference_mode():
        constants = {"ids": ids.clone(), "advantages": advantages.clone(), "ref": ref.clone(), "weight": weight.clone()}
        mask, cu_seqlens = torch.ones(B, T), torch.arange(B + 1) * T
    assert all(x.is_inference() for x in (*constants.values(), mask))

    def gradient(ids, advantages, ref, weight, mask, cu_seqlens):
        leaf, given = hidden.clone().requires_grad_(), {}
        x = leaf
        if packed_rows:
            x, ids, ref, mask = leaf.flatten(0, 1), ids.flatten(), ref.flatten(), mask.flatten()
            given["cu_seqlens"] = cu_seqlens
        out = rlvr_ops.ace_loss(
            x, weight, ids, advantages, ref_per_token_logps=ref, completion_mask=mask, schedule=schedule, **given
        )
        scores = rlvr_ops.token_logps(x, weight, ids).logps
        return torch.autograd.grad(out.loss + scores.sum(), leaf)[0]

    truth = gradient(ids, advantages, ref, weight, torch.ones(B, T), torch.arange(B + 1) * T)
    assert torch.equal(gradient(**constants, mask=mask, cu_seqlens=cu_seqlens), truth)


def arguments():
    hidden, weight, ids, advantages, ref = dense_batch()
    return {
        "hidden_states": hidden, "lm_head_weight": weight, "completion_ids": ids, "advantages": advantages,
        "ref_per_token_logps": ref, "old_per_token_logps": ref, "completion_mask": torch.ones(B, T),
        "lm_head_bias": torch.zeros(V), "temperature": torch.ones(B),
    }  # fmt: skip


class Distributed(torch.Tensor):
    """What the checks see of a DTensor."""

    sharded = True

    @property
    def placements(self):
        return (SimpleNamespace(is_replicate=lambda: not self.sharded),)

    def full_tensor(self):
        raise AssertionError("nobody asked for a collective")


@pytest.mark.parametrize("name", arguments())
@pytest.mark.parametrize("sharded", [True, False])
def test_a_distributed_tensor_is_refused_by_name_and_as_what_it_is(name, sharded):
    given = arguments()
    given[name] = given[name].as_subclass(Distributed)
    given[name].sharded = sharded
    kind, way = ("sharded", "full_tensor") if sharded else ("replicated", "to_local")
    with pytest.raises(
        TypeError, match=rf"^{name} must be a whole tensor, got a {kind} DTensor: pass {name}\.{way}\(\)"
    ):
        rlvr_ops.ace_loss(**given)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.complex64])
@pytest.mark.parametrize(
    "name", ["hidden_states", "lm_head_weight", "lm_head_bias", "advantages", "ref_per_token_logps"]
)
def test_a_dtype_that_nothing_here_multiplies_is_refused_by_name(name, dtype):
    given = arguments()
    given[name] = given[name].to(dtype)
    with pytest.raises(TypeError, match=f"^{name} must have a floating dtype"):
        rlvr_ops.ace_loss(**given)


@pytest.mark.parametrize("name", ["lm_head_weight", "hidden_states"])
def test_a_sparse_tensor_is_refused_by_name(name):
    hidden, weight, ids, advantages, _ = dense_batch()
    given = {"hidden_states": hidden, "lm_head_weight": weight}
    given[name] = given[name].to_sparse()
    with pytest.raises(
        TypeError, match=f"{name} must be an ordinary strided tensor, got a tensor of layout torch.sparse"
    ):
        rlvr_ops.grpo_loss(**given, completion_ids=ids, advantages=advantages)


def test_meta_and_fake_tensors_are_refused_by_name():
    given = {name: value.to("meta") for name, value in arguments().items()}
    with pytest.raises(TypeError, match=r"^hidden_states must hold numbers, got a meta tensor"):
        rlvr_ops.ace_loss(**given)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in arguments().items()}
        with pytest.raises(TypeError, match=r"^hidden_states must hold numbers, got a fake tensor"):
            rlvr_ops.ace_loss(**fake)
    with pytest.raises(TypeError, match=r"^per_token_logps must hold numbers, got a meta tensor"):
        rlvr_ops.grpo_loss_from_logps(given["ref_per_token_logps"], given["advantages"])


# Numbers


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [0, 0.0, torch.tensor(0), torch.tensor([0.0])], ids=repr)
def test_a_global_count_of_zero_is_a_loss_of_zero_attached_if_nothing_counts(loss_type, schedule, count):
    hidden, weight, ids, advantages, ref = dense_batch()
    leaf = hidden.clone().requires_grad_()
    given = {"num_items_in_batch": count, "loss_type": loss_type, "ref_per_token_logps": ref, "beta": 0.1}
    out = policy_loss(leaf, weight, ids, advantages, completion_mask=torch.zeros(B, T), schedule=schedule, **given)
    assert out.loss.item() == 0
    assert not bool(torch.autograd.grad(out.loss, leaf)[0].any())
    with pytest.raises(ValueError, match=r"num_items_in_batch must be > 0, the .* of the global batch, got 0"):
        policy_loss(leaf, weight, ids, advantages, schedule=schedule, **given)


@pytest.mark.parametrize(
    ("changes", "message", "error"),
    [
        ({"logit_scale": None}, "logit_scale must be a number, got None", TypeError),
        ({"logit_scale": torch.tensor(1.0, requires_grad=True)}, "logit_scale must be a number, got tensor", TypeError),
        ({"softcap": torch.tensor(3.0)}, "softcap must be a number, got tensor", TypeError),
        ({"temperature": None}, "temperature must be a number or a tensor, got None", TypeError),
        ({"temperature": torch.full((B,), float("nan"))}, "temperature must be > 0 and finite, got nan", ValueError),
        ({"temperature": torch.full((B,), float("inf"))}, "temperature must be > 0 and finite, got inf", ValueError),
        (
            {"temperature": torch.ones(B, requires_grad=True)},
            r"temperature must not require a gradient, which it would not get: pass temperature\.detach\(\)",
            ValueError,
        ),
    ],
)
def test_a_number_that_would_lose_its_gradient_or_is_none_is_refused_by_name(changes, message, error):
    hidden, weight, ids, advantages, ref = dense_batch()
    with pytest.raises(error, match=message):
        rlvr_ops.ace_loss(hidden, weight, ids, advantages, ref_per_token_logps=ref, **changes)
    with pytest.raises(error, match=message):
        rlvr_ops.token_logps(hidden, weight, ids, **changes)


@pytest.mark.parametrize(
    ("changes", "message", "error"),
    [
        ({"num_items_in_batch": float("inf")}, "num_items_in_batch must be > 0, .*got inf", ValueError),
        ({"num_items_in_batch": torch.ones((), device="meta")}, "num_items_in_batch must hold numbers", TypeError),
        ({"num_items_in_batch": torch.ones((), dtype=torch.cfloat)}, "num_items_in_batch must hold real", TypeError),
        ({"loss_type": "dr_grpo", "max_completion_length": "8"}, "max_completion_length must be a number", TypeError),
        ({"loss_type": []}, r"loss_type must be one of .*, got \[\]", ValueError),
        ({"use_bias_correction_kl": "yes"}, "use_bias_correction_kl must be a bool, got 'yes'", TypeError),
    ],
)
def test_a_setting_of_a_loss_that_is_no_setting_is_refused_by_name(changes, message, error):
    hidden, weight, ids, advantages, ref = dense_batch()
    with pytest.raises(error, match=message):
        rlvr_ops.ace_loss(hidden, weight, ids, advantages, ref_per_token_logps=ref, **changes)


def test_two_dtypes_on_an_accelerator_are_said_once_with_the_way_out(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know the device "meta"
    head, states = Head(torch.empty(V, H, device="meta")), torch.empty(B, T, H, device="meta", dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"hidden_states are torch\.bfloat16 and lm_head_weight is torch\.float32"):
        assert head.compute_dtype(states) == torch.float32
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            head.compute_dtype(states)
    assert len(said) == 1
    assert "cast one of them, or call the loss under torch.autocast" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Head(torch.empty(V, H)).compute_dtype(torch.empty(B, T, H, dtype=torch.bfloat16))  # a CPU widens as fast

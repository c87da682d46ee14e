"""What every function around the losses promises: tensors it cannot read are named, gradients are stated, pickles work."""

import inspect
import pickle
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward
import torch.distributed as dist
from torch import tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from rlvr_ops import advantages, calibration, evaluation, rewards

PACKAGES = (advantages, calibration, evaluation, rewards)
PUBLIC = {name: getattr(package, name) for package in PACKAGES for name in package.__all__ if name != "ESTIMATORS"}
FUNCTIONS = [value for value in PUBLIC.values() if inspect.isfunction(value)]

LOGPS, MASK, PACKED = -torch.arange(1.0, 7) / 6, torch.ones(6), tensor([0, 3, 6])
R, IDS, Q = tensor([1.0, 0, 1, 0]), tensor([0, 0, 1, 1]), tensor([0.5, 0.25, 0.75, 1.0])
CASES = [
    (advantages.group_advantages, {"rewards": R, "group_ids": IDS}),
    (advantages.group_advantages, {"rewards": R, "group_size": 2, "estimator": "opo", "lengths": tensor([1.0, 2, 3, 4])}),
    (advantages.group_advantages, {"rewards": R, "group_size": 2, "estimator": "remax", "reward_baselines": Q}),
    (advantages.group_advantages, {"rewards": R, "group_size": 2, "estimator": "oblr", "squared_gradient_norms": Q}),
    (advantages.group_advantages, {"rewards": R, "group_size": 2, "estimator": "lens", "confidences": Q}),
    (advantages.group_advantages, {"rewards": R, "group_size": 2, "estimator": "paired", "pair_ids": 0 * IDS, "lambda_neg": Q}),
    (
        advantages.gdpo_advantages,
        {"rewards": torch.stack([R, Q], 1), "group_ids": IDS, "reward_weights": [1.0, 0.5], "lengths": tensor([1.0, 2, 3, 4])},
    ),
    (
        advantages.otb_advantages,
        {
            "rewards": R[:2], "per_token_logps": LOGPS, "sum_p_squared": -LOGPS, "completion_mask": MASK,
            "group_ids": IDS[:2], "cu_seqlens": PACKED, "importance_sampling_ratio": -LOGPS,
        },
    ),
    (advantages.informative_groups, {"correct": R, "group_ids": IDS}),
    (advantages.easy_but_brittle, {"correct": R, "group_ids": IDS, "c": 1}),
    (advantages.overlong_penalty, {"lengths": tensor([1.0, 95, 98, 101]), "max_length": 100, "cache": 10}),
    (
        advantages.arm_advantages,
        {
            "advantages": R[:2], "per_token_logps": LOGPS.view(2, 3), "completion_mask": MASK.view(2, 3),
            "prompt_logps": LOGPS.view(2, 3), "prompt_mask": MASK.view(2, 3), "correct": R[:2], "group_ids": IDS[:2], "alpha": 1.0,
        },
    ),
    (
        advantages.ace_advantages,
        {"advantages": R[:2], "per_token_logps": LOGPS, "ref_per_token_logps": LOGPS - 0.1, "completion_mask": MASK,
         "cu_seqlens": PACKED},
    ),
    (
        advantages.squared_gradient_norms,
        {"per_token_logps": LOGPS, "sum_p_squared": -LOGPS, "hidden_states": torch.ones(6, 2), "completion_mask": MASK,
         "cu_seqlens": PACKED},
    ),
    (rewards.rlcr_reward, {"correct": R, "confidences": Q}),
    (rewards.prompt4trust_reward, {"correct": R, "confidences": Q}),
    (rewards.crew_reward, {"per_token_logps": LOGPS, "answer_mask": MASK, "cu_seqlens": PACKED}),
    (rewards.trust_grpo_reward, {"outcome_rewards": R, "thinking_rewards": Q, "step": 1, "total_steps": 2, "group_ids": IDS}),
    (rewards.ppo_c_reward, {"rewards": R, "confidences": Q, "running_mean": tensor(0.5)}),
    (rewards.mean_token_probability, {"per_token_logps": LOGPS, "completion_mask": MASK, "cu_seqlens": PACKED}),
    (rewards.mean_self_certainty, {"self_certainty": LOGPS, "completion_mask": MASK, "cu_seqlens": PACKED}),
    (calibration.brier_score, {"confidences": Q, "correct": R}),
    (calibration.expected_calibration_error, {"confidences": Q, "correct": R}),
    (calibration.auroc, {"confidences": Q, "correct": R}),
    (calibration.reliability_bins, {"confidences": Q, "correct": R}),
    (
        calibration.tokenised_brier_loss,
        {
            "hidden_states": LOGPS.view(2, 3), "lm_head_weight": torch.arange(15.0).view(5, 3) / 15,
            "confidence_token_ids": tensor([4, 0, 2]), "correct": R[:2], "confidence_mask": torch.ones(2),
            "temperature": Q[:2], "lm_head_bias": torch.arange(5.0), "num_items_in_batch": tensor(3.0),
        },
    ),
    (
        calibration.tokenised_brier_loss,
        {
            "hidden_states": LOGPS.view(2, 3), "lm_head_weight": torch.ones(5, 3), "confidence_token_ids": tensor([4, 0, 2]),
            "correct": R[:2], "temperature": Q[:2],
        },
    ),
    (calibration.borda_vote, {"answers": ["a", "b", "a", None], "self_certainty": Q}),
    (evaluation.pass_at_k, {"n": tensor([4.0, 4]), "c": R[:2], "k": 2}),
    (evaluation.bootstrap_interval, {"values": Q, "resamples": 50}),
    (evaluation.paired_bootstrap_interval, {"before": Q, "after": R, "resamples": 50}),
]  # fmt: skip
DIFFERENTIABLE = {
    advantages.overlong_penalty: {"lengths"},
    calibration.tokenised_brier_loss: {
        "hidden_states", "lm_head_weight", "lm_head_bias", "temperature", "num_items_in_batch",
    },
}  # fmt: skip
ON_THE_HOST = (calibration.borda_vote, evaluation.bootstrap_interval, evaluation.paired_bootstrap_interval)
TENSORS = [
    pytest.param(function, given, name, id=f"{function.__name__}-{given.get('estimator', '')}-{name}")
    for function, given in CASES
    for name, value in given.items()
    if isinstance(value, torch.Tensor)
]
every_tensor = pytest.mark.parametrize(("function", "given", "name"), TENSORS)
every_call = pytest.mark.parametrize(("function", "given"), CASES)


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def same(got, expected):
    if isinstance(expected, tuple):
        for one, other in zip(got, expected, strict=True):
            same(one, other)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected, equal_nan=True, check_dtype=False)
    else:
        assert got == expected


def test_every_function_that_takes_a_tensor_has_a_case():
    texts = {rewards.stated_confidence, rewards.stated_confidences}
    assert {function for function, _ in CASES} == set(FUNCTIONS) - texts


@pytest.mark.parametrize("name", PUBLIC)
def test_every_function_and_record_class_is_pickled_by_its_name(name):
    assert pickle.loads(pickle.dumps(PUBLIC[name])) is PUBLIC[name]


@every_call
def test_every_result_survives_a_pickle(function, given):
    result = function(**given)
    copy = pickle.loads(pickle.dumps(result))
    assert type(copy) is type(result)
    same(copy, result)


@every_tensor
def test_a_tensor_without_numbers_is_refused_by_name(function, given, name):
    for unreadable in (given[name].to("meta"), FakeTensorMode().from_tensor(given[name])):
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must (hold numbers, got a|be on cpu like)"):
            function(**{**given, name: unreadable})


@every_call
def test_of_tensors_that_are_all_without_numbers_one_is_named(function, given):
    mode = FakeTensorMode()
    for convert in (lambda value: value.to("meta"), mode.from_tensor):
        unreadable = {n: convert(v) if isinstance(v, torch.Tensor) else v for n, v in given.items()}
        with pytest.raises(TypeError, match=rf"^({'|'.join(given)}) must hold numbers, got a (meta|fake) tensor"):
            function(**unreadable)


@every_tensor
def test_a_dtensor_is_refused_by_name_with_the_way_out(function, given, name, mesh):
    shared = distribute_tensor(given[name], mesh, [Replicate()])
    with pytest.raises(
        TypeError, match=rf"^{name} must be a whole tensor, got a replicated DTensor: pass {name}\.to_local\(\)"
    ):
        function(**{**given, name: shared})


@every_tensor
def test_complex_numbers_are_refused_by_name(function, given, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch would drop the imaginary part with a warning
        with pytest.raises((TypeError, ValueError), match=f"^{name} must "):
            function(**{**given, name: given[name].to(torch.complex64)})


@every_tensor
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool])
def test_whole_numbers_and_bools_are_read_exactly_or_refused_by_name(function, given, name, dtype):
    value = given[name].to(dtype)
    try:
        got = function(**{**given, name: value})
    except (TypeError, ValueError) as error:
        assert name in str(error)  # noqa: PT017
    else:
        same(got, function(**{**given, name: value.to(given[name].dtype)}))


@every_tensor
def test_tensors_made_in_inference_mode_work_and_the_others_get_their_gradients(function, given, name):
    with torch.inference_mode():
        made = given[name].clone()
    differentiable = DIFFERENTIABLE.get(function, set()).intersection(given) - {name}
    leaves = {n: given[n].clone().requires_grad_() for n in differentiable}
    got = function(**{**given, **leaves, name: made})
    same(got, function(**given))
    if leaves:
        torch.autograd.grad(got, list(leaves.values()))
    with torch.inference_mode():
        same(function(**{**given, name: made}), function(**given))


@pytest.mark.parametrize(
    ("function", "given", "name"), [case for case in TENSORS if case.values[1][case.values[2]].is_floating_point()]
)
def test_the_forward_mode_tangent_is_right_or_stated_to_be_none(function, given, name):
    value = given[name]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    with forward.dual_level():
        got = function(**{**given, name: forward.make_dual(value.double(), direction)})
        found = [
            forward.unpack_dual(x).tangent for x in (got if isinstance(got, tuple) else (got,)) if torch.is_tensor(x)
        ]
    if name not in DIFFERENTIABLE.get(function, set()):
        assert all(tangent is None or not tangent.any() for tangent in found)
        assert "a constant to any gradient" in " ".join(function.__doc__.split()).lower()
        return
    doubles = {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in given.items()}
    ahead, behind = (function(**{**doubles, name: doubles[name] + s * direction}) for s in (1e-6, -1e-6))
    with forward.dual_level():
        exact = forward.unpack_dual(function(**{**doubles, name: forward.make_dual(doubles[name], direction)})).tangent
    torch.testing.assert_close(exact, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)
    _, by_func = torch.func.jvp(lambda x: function(**{**doubles, name: x}), (doubles[name],), (direction,))
    torch.testing.assert_close(by_func, exact)


def negative_zeros(value):
    """Whether a result holds a -0.0."""
    if isinstance(value, tuple):
        return any(map(negative_zeros, value))
    value = torch.as_tensor([] if isinstance(value, dict | str) else value)
    return value.is_floating_point() and bool((value.signbit() & (value == 0)).any())


@pytest.mark.parametrize(
    ("function", "given"), [c for c in CASES if c[0] is not advantages.ace_advantages]
)  # as they came
def test_no_zero_of_a_result_is_negative_whichever_zero_came(function, given):
    given = {
        n: torch.where(v == 0, -0.0, v) if torch.is_tensor(v) and v.is_floating_point() else v for n, v in given.items()
    }
    assert not negative_zeros(function(**given))


NOTHING, ONES = tensor([-0.0, -0.0]), torch.ones(2)


@pytest.mark.parametrize(
    "result",
    [
        lambda: evaluation.pass_at_k(4, 0, 4),
        lambda: evaluation.bootstrap_interval(NOTHING, resamples=5),
        lambda: evaluation.paired_bootstrap_interval(NOTHING, -NOTHING, resamples=5),
        lambda: advantages.overlong_penalty(NOTHING, max_length=0, cache=0),
        lambda: advantages.squared_gradient_norms(NOTHING[None], torch.ones(1, 2), -torch.zeros(1, 2, 3)),
        lambda: advantages.arm_advantages(
            NOTHING, -ONES[:, None], prompt_logps=NOTHING[:, None], correct=ONES, group_size=2, alpha=0.0
        ),
        lambda: rewards.mean_self_certainty(NOTHING[None]),
        lambda: rewards.mean_self_certainty(NOTHING, cu_seqlens=tensor([0, 1, 2])),
        lambda: rewards.rlcr_reward(NOTHING, NOTHING),
        lambda: rewards.prompt4trust_reward(ONES, ONES),
        lambda: rewards.trust_grpo_reward(NOTHING, -ONES, step=0, total_steps=1, group_size=2),
        lambda: rewards.ppo_c_reward(NOTHING, -NOTHING, -0.0),
        lambda: rewards.ppo_c_reward(NOTHING, -NOTHING, -5.0, ema=1.0),
        lambda: calibration.brier_score(NOTHING, NOTHING),
        lambda: calibration.expected_calibration_error(NOTHING, NOTHING),
        lambda: calibration.reliability_bins(NOTHING, NOTHING, bins=1),
        lambda: calibration.tokenised_brier_loss(NOTHING[None], -torch.zeros(2, 2), tensor([0, 1]), ONES[:1]) * 0,
    ],
)
def test_no_zero_is_negative(result):
    assert not negative_zeros(result())


@pytest.mark.parametrize(("function", "given"), [case for case in CASES if case[0] not in ON_THE_HOST])
def test_torch_compile_gives_the_same(function, given):
    same(torch.compile(function, backend="eager")(**given), function(**given))

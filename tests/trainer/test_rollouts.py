"""Rollouts: where a completion ends, which groups are left out, and what is logged about it."""

import typing
from dataclasses import replace

import pytest
import torch
from rlvr_trainer.algorithm import BINARY, BY_LENGTH, AlgorithmConfig
from rlvr_trainer.console import completion_rows
from rlvr_trainer.judging.verdict import PARTLY, Verdict
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.policies import load_policy
from rlvr_trainer.rollouts import _lay_out, collect, sample
from rlvr_trainer.tasks import Problem

import rlvr_ops
from rlvr_ops.advantages.estimators import ESTIMATORS


def laid_out(policy, generated):
    """Prompts of two tokens and rows of one length, as `generate` gives them, as rollouts."""
    completions = [policy.sampler._cut(row, [-1.0] * len(row), 0) for row in generated]
    problems = [Problem("p", "a")] * len(generated)
    return _lay_out(policy, [[9, 9]] * len(generated), completions, problems, len(generated[0]))


def test_the_first_end_token_counts_and_nothing_behind_it(untrained):
    # End is 2, pad is 0; a second end and other tokens behind the first do not count.
    rollouts = laid_out(untrained, [[20, 2, 0, 0], [2, 20, 2, 21], [20, 21, 22, 23]])
    assert rollouts.completion_mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert rollouts.ended.tolist() == [True, True, False]
    assert rollouts.texts == ["0", "", "0123"]
    assert torch.equal(rollouts.attention_mask[:, 2:], rollouts.completion_mask)
    assert torch.equal(rollouts.sampling_logps.isnan(), rollouts.completion_mask == 0)


def test_every_end_token_of_the_model_ends_a_completion(small, digits):
    config = small("policy.warm_start_steps=0")
    policy = load_policy(config, digits())
    policy.eos_ids = [2, 30]
    policy.start_sampler(config)
    assert laid_out(policy, [[20, 30, 20]]).completion_mask.tolist() == [[1, 1, 0]]


def test_a_prompt_pads_on_the_left_and_its_completions_stay_together(untrained, small):
    problems = [Problem("a", "x"), Problem("a longer one", "y")]
    rollouts = sample(untrained, problems, small(), 3, 1.0)
    assert [p.prompt for p in rollouts.problems] == ["a"] * 3 + ["a longer one"] * 3
    assert rollouts.attention_mask[0, :12].tolist() == [0] * 11 + [1]
    assert rollouts.completion_ids.shape == rollouts.completion_mask.shape == (6, 5)
    assert torch.equal(rollouts.input_ids[:, -5:], rollouts.completion_ids)


def test_selecting_rows_drops_the_columns_that_are_padding_in_all_of_them(untrained):
    rollouts = laid_out(untrained, [[20, 2, 0, 0], [20, 21, 22, 23]])
    rollouts.attention_mask[0, 0] = 0
    part = rollouts.select([0])
    assert part.input_ids.tolist() == [[9, 20, 2]]
    assert part.completion_ids.tolist() == [[20, 2]]
    assert part.sampling_logps.tolist() == [[-1.0, -1.0]]
    assert rollouts.select([]).completion_ids.shape == (0, 1)


def test_sampling_in_smaller_batches_gives_as_many_rollouts(untrained, small):
    problems = [Problem(str(i), "x") for i in range(5)]
    assert len(sample(untrained, problems, small("rollout.batch_size=4"), 2, 1.0)) == 10


def test_a_prompt_beyond_the_models_positions_is_refused(untrained, small):
    with pytest.raises(ConfigError, match=r"a prompt of 1030 tokens and rollout\.max_new_tokens = 5 exceed.*1024"):
        sample(untrained, [Problem("1" * 1030, "x")], small(), 2, 1.0)


def test_a_group_whose_reference_cannot_be_read_is_counted_and_left_out(untrained, small, digits):
    batch, cursor = collect(untrained, digits(broken=("problem 1",)), 0, small())
    assert cursor == 3
    assert {p.prompt for p in batch.rollouts.problems} == {"problem 0", "problem 2"}
    assert batch.metrics["judge/bad_reference"] == 4
    assert batch.metrics["sampling/rollouts"] == 12
    assert batch.metrics["sampling/groups_kept"] == 2
    assert len(batch.rewards) == len(batch.advantages) == 8


def test_errors_in_every_group_leave_an_empty_batch(untrained, small, digits):
    batch, _ = collect(untrained, digits(broken=tuple(f"problem {i}" for i in range(3))), 0, small())
    assert len(batch.rollouts) == 0
    assert "reward" not in batch.metrics


def test_dynamic_sampling_replaces_groups_that_teach_nothing(untrained, small, digits):
    torch.manual_seed(1)
    config = small("algorithm.name=dapo", "algorithm.max_resamples=20", "rollout.group_size=8")
    task = digits(solved=("problem 0", "problem 1"))
    batch, cursor = collect(untrained, task, 0, config)
    verdicts = task.score(batch.rollouts.problems, batch.rollouts.texts)
    correct = torch.tensor([verdict.score for verdict in verdicts]).reshape(-1, 8)
    assert batch.metrics["sampling/groups_kept"] == len(correct) == 3
    assert ((correct.mean(1) > 0) & (correct.mean(1) < 1)).all()
    assert batch.metrics["sampling/groups_uninformative"] == cursor - 3 >= 2
    assert batch.metrics["frac_reward_zero_std"] == 0.0


def test_dynamic_sampling_gives_up_after_the_rounds_it_may_take(untrained, small, digits):
    config = small("algorithm.name=dapo", "algorithm.max_resamples=2")
    batch, cursor = collect(untrained, digits(solved=tuple(f"problem {i}" for i in range(9))), 0, config)
    assert (len(batch.rollouts), cursor) == (0, 9)


def test_overlong_completions_lose_reward_under_dapo(untrained, small, digits):
    torch.manual_seed(0)
    config = small(
        "algorithm.name=dapo", "algorithm.dynamic_sampling=false", "algorithm.overlong_fraction=0.4"
    )  # 5 tokens, of which the last 2 cost: nothing up to 3, then -0.5, then -1
    batch, _ = collect(untrained, digits(), 0, config)
    lengths = batch.rollouts.completion_mask.sum(1)
    correct = torch.tensor([float(text[:1].isdigit()) for text in batch.rollouts.texts])
    assert torch.equal(batch.rewards, correct - 0.5 * (lengths - 3).clamp(min=0))
    assert (lengths == 5).any()


@pytest.mark.parametrize("estimator", typing.get_args(typing.get_type_hints(AlgorithmConfig)["advantages"]))
def test_every_estimator_of_the_settings_is_the_librarys(untrained, small, digits, estimator):
    batch, _ = collect(untrained, digits(), 0, small(f"algorithm.advantages={estimator}"))
    lengths = batch.rollouts.lengths() if estimator in BY_LENGTH else None
    expected = rlvr_ops.group_advantages(batch.rewards, 4, estimator, lengths=lengths)
    assert torch.equal(batch.advantages, expected)
    assert ESTIMATORS[estimator].binary == (estimator in BINARY)
    assert ("lengths" in ESTIMATORS[estimator].needs + ESTIMATORS[estimator].takes) == (estimator in BY_LENGTH)


def test_truncated_completions_can_be_masked_and_still_count_in_their_groups_mean(untrained, small, digits):
    batches = []
    for mask in ("false", "true"):
        torch.manual_seed(3)
        config = small(f"rollout.mask_truncated={mask}", "rollout.group_size=16", "rollout.max_new_tokens=40")
        batches.append(collect(untrained, digits(), 0, config)[0])
    whole, masked = batches
    ended = whole.rollouts.ended
    assert 0 < ended.sum() < len(ended)
    assert torch.equal(masked.rewards, whole.rewards)
    assert torch.equal(masked.advantages, whole.advantages)
    assert torch.equal(masked.rollouts.completion_mask, whole.rollouts.completion_mask * ended[:, None])
    assert torch.equal(masked.rollouts.lengths(), whole.rollouts.lengths())
    assert {k: v for k, v in masked.metrics.items() if "perf" not in k} == {
        k: v for k, v in whole.metrics.items() if "perf" not in k
    }
    assert completion_rows(masked) == completion_rows(whole)


def test_accuracy_by_part_is_for_mixtures_alone(untrained, small, digits):
    assert not any(name.startswith("accuracy/") for name in collect(untrained, digits(), 0, small())[0].metrics)


def test_the_score_itself_can_be_the_reward(untrained, small, digits, monkeypatch):
    task = digits()
    scores = lambda problems, texts: [Verdict(0.25 + 0.5 * (i % 2), PARTLY) for i in range(len(texts))]  # noqa: E731
    monkeypatch.setattr(task, "score", scores)
    assert collect(untrained, task, 0, small())[0].rewards.unique().tolist() == [0.0]
    assert collect(untrained, task, 0, small("task.reward=score"))[0].rewards.unique().tolist() == [0.25, 0.75]


def test_sampling_gives_the_threads_back(untrained, small, monkeypatch):
    seen = []
    config, policy = small("rollout.threads=2"), replace(untrained)
    policy.start_sampler(config)
    own = policy.model.generate
    monkeypatch.setattr(policy.model, "generate", lambda **k: (seen.append(torch.get_num_threads()), own(**k))[1])
    sample(policy, [Problem("a", "x")], config, 2, 1.0)
    assert seen == [2]
    assert torch.get_num_threads() == 1

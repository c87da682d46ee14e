"""What a run is asked at an evaluation: counts of right answers, confidence shifts of wrong ones, entropy."""

from typing import Any

import torch
from rlvr_trainer.config import Config
from rlvr_trainer.policies import Policy
from rlvr_trainer.rollouts import Rollouts, sample
from rlvr_trainer.scoring import scores_of
from rlvr_trainer.tasks import Task
from torch import Tensor

from rlvr_ops.objectives.objective import EXPLORATORY_BAND


def measure(policy: Policy, reference: Policy, task: Task, config: Config) -> dict[str, Any]:
    """Outcomes on the held-out problems, of `evaluation.samples` answers to each.

    correct: per problem, how many are right. distinct_right, distinct: how many different right answers, and answers, a
    problem has on average. overconfident: the share of wrong answers whose shift c is above the exploratory band;
    overconfidence: their mean c. shift_right, shift_wrong: mean c of right and wrong answers. entropy: of a whole answer in
    nats, estimated by -log p of the samples. Without a right, a wrong or an overconfident answer its mean is None.
    """
    n, temperature = config.evaluation.samples, config.evaluation.temperature
    rollouts = sample(policy, task.held_out, config, n, temperature, config.evaluation.seed)
    verdicts = task.score(rollouts.problems, rollouts.texts)
    right = torch.tensor([verdict.score == 1 for verdict in verdicts])
    logps = rollouts.sampling_logps.nan_to_num(0.0).double()
    mask = rollouts.completion_mask.double()
    shift = ((logps - _reference_logps(reference, rollouts, config)) * mask).sum(1) / mask.sum(1)
    over = ~right & (shift > EXPLORATORY_BAND)
    wrong = ~right
    return {
        "correct": right.reshape(-1, n).sum(1).tolist(),
        "distinct_right": _distinct(rollouts, n, right),
        "distinct": _distinct(rollouts, n, torch.ones_like(right)),
        "overconfident": _rounded(over.sum() / wrong.sum()) if wrong.any() else None,
        "overconfidence": _mean(shift[over]),
        "shift_right": _mean(shift[right]),
        "shift_wrong": _mean(shift[wrong]),
        "entropy": _mean(-(logps * mask).sum(1)),
        "length": _mean(mask.sum(1)),
    }


def _reference_logps(reference: Policy, rollouts: Rollouts, config: Config) -> Tensor:
    """(B, T) float64, each different completion of a prompt scored once."""
    keys = [tuple(row) for row in rollouts.input_ids.tolist()]
    firsts = {key: i for i, key in reversed(list(enumerate(keys)))}
    rows, size = sorted(firsts.values()), config.rollout.batch_size
    place = {row: j for j, row in enumerate(rows)}
    found = torch.zeros(len(rows), rollouts.completion_ids.shape[1], dtype=torch.float64)
    for start in range(0, len(rows), size):
        part = rollouts.select(rows[start : start + size])
        scores = scores_of(reference, part, config.evaluation.temperature)
        found[start : start + size, : scores.shape[1]] = scores
    return found[[place[firsts[key]] for key in keys]]


def _distinct(rollouts: Rollouts, n: int, counted: Tensor) -> float:
    """How many different texts a problem has on average among the counted answers."""
    texts, chosen = rollouts.texts, counted.tolist()
    groups = range(0, len(texts), n)
    return round(sum(len({texts[i].strip() for i in range(g, g + n) if chosen[i]}) for g in groups) / len(groups), 4)


def _mean(values: Tensor) -> float | None:
    return _rounded(values.mean()) if len(values) else None


def _rounded(value: Tensor) -> float:
    return round(float(value), 5)

"""What a run is asked at an evaluation: counts of right answers, confidence shifts of wrong ones, entropy."""

from collections.abc import Sequence
from typing import Any

import torch
from rlvr_trainer.config import Config
from rlvr_trainer.policies import Policy
from rlvr_trainer.rollouts import Rollouts, sample
from rlvr_trainer.scoring import scores_of
from rlvr_trainer.tasks import Task
from torch import Tensor

from rlvr_ops.objectives.objective import EXPLORATORY_BAND

Part = dict[str, Any]


def answer(policy: Policy, reference: Policy, task: Task, config: Config, first: int, count: int) -> Part:
    """`evaluation.samples` answers to each of `count` held-out problems, and what is asked of each answer.

    right: its verdict. shift: its c. nats: -log p of the whole answer. length: in tokens. And of each problem, how many different
    right answers and different answers there are. Parts of the problems together are what all of them at once would be.
    """
    n, temperature = config.evaluation.samples, config.evaluation.temperature
    problems, seed = task.held_out[first : first + count], config.evaluation.seed + first * n
    rollouts = sample(policy, problems, config, n, temperature, seed)
    right = [verdict.score == 1 for verdict in task.score(rollouts.problems, rollouts.texts)]
    logps = rollouts.sampling_logps.nan_to_num(0.0).double()
    mask = rollouts.completion_mask.double()
    shift = ((logps - _reference_logps(reference, rollouts, config)) * mask).sum(1) / mask.sum(1)
    return {
        "right": right,
        "shift": shift.tolist(),
        "nats": (-(logps * mask).sum(1)).tolist(),
        "length": mask.sum(1).tolist(),
        "distinct_right": _distinct(rollouts.texts, n, right),
        "distinct": _distinct(rollouts.texts, n, [True] * len(right)),
    }


def outcomes(parts: Sequence[Part]) -> dict[str, Any]:
    """What the answers come to.

    correct: per problem, how many are right. distinct_right, distinct: how many different right answers, and answers, a
    problem has on average. overconfident: the share of wrong answers whose shift c is above the exploratory band;
    overconfidence: their mean c. shift_right, shift_wrong: mean c of right and wrong answers. entropy: of a whole answer in
    nats, estimated by -log p of the samples. Without a right, a wrong or an overconfident answer its mean is None.
    """
    every = {key: [value for part in parts for value in part[key]] for key in parts[0]}
    right, problems = torch.tensor(every["right"]), len(every["distinct"])
    shift = torch.tensor(every["shift"], dtype=torch.float64)
    wrong, over = ~right, ~right & (shift > EXPLORATORY_BAND)
    return {
        "correct": right.reshape(problems, -1).sum(1).tolist(),
        "distinct_right": round(sum(every["distinct_right"]) / problems, 4),
        "distinct": round(sum(every["distinct"]) / problems, 4),
        "overconfident": _rounded(over.sum() / wrong.sum()) if wrong.any() else None,
        "overconfidence": _mean(shift[over]),
        "shift_right": _mean(shift[right]),
        "shift_wrong": _mean(shift[wrong]),
        "entropy": _mean(torch.tensor(every["nats"], dtype=torch.float64)),
        "length": _mean(torch.tensor(every["length"], dtype=torch.float64)),
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


def _distinct(texts: Sequence[str], n: int, counted: Sequence[bool]) -> list[int]:
    """How many different texts each problem has among the counted answers."""
    groups = range(0, len(texts), n)
    return [len({texts[i].strip() for i in range(g, g + n) if counted[i]}) for g in groups]


def _mean(values: Tensor) -> float | None:
    return _rounded(values.mean()) if len(values) else None


def _rounded(value: Tensor) -> float:
    return round(float(value), 5)

"""Pass@k on the held-out problems, with bootstrap intervals over problems, and how well confidence tells right from wrong."""

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import rlvr_ops
from rlvr_ops.evaluation import bootstrap_interval, paired_bootstrap_interval
from rlvr_trainer.config import Config
from rlvr_trainer.judging.verdict import Verdict, counts
from rlvr_trainer.policies import Policy
from rlvr_trainer.rollouts import Rollouts, sample
from rlvr_trainer.scoring import confidences_of
from rlvr_trainer.tasks import Task

RELIABILITY_BINS = 10


@dataclass
class Evaluation:
    """How many of `samples` answers were correct per held-out problem; None where it could not be judged.

    `reasons` counts the answers that were not simply right or wrong. `most_likely` says of each problem whether the answer
    with the largest mean log-probability was right. `confidences` and `verdicts` are of every answer, the
    `samples` of a problem next to each other, and a verdict is None where it could not be judged. `stated` of the
    confidences were written into the answers, the others are mean token probabilities.
    """

    samples: int
    correct: list[int | None]
    reasons: dict[str, float]
    mean_length: float
    most_likely: list[bool | None] | None = None
    confidences: list[float] | None = None
    verdicts: list[bool | None] | None = None
    stated: int = 0
    parts: list[str] | None = None  # of a mixture, the one that each problem is from

    def unjudged(self) -> int:
        """Problems that could not be judged."""
        return sum(count is None for count in self.correct)

    def unjudged_sentence(self) -> str:
        """What a person should know about them."""
        return f"{self.unjudged()} of {len(self.correct)} problems could not be judged and are not counted"

    def per_problem(self, k: int) -> list[float]:
        """Pass@k of each problem that could be judged."""
        return [rlvr_ops.pass_at_k(self.samples, c, k) for c in self.correct if c is not None]

    def pass_at(self, k: int) -> tuple[float, float, float]:
        """Mean Pass@k with its 95 % interval: (mean, low, high)."""
        values = self.per_problem(k)
        low, high = bootstrap_interval(values)
        return sum(values) / len(values), low, high

    def metrics(self) -> dict[str, float]:
        """`eval/pass@k` with `/low` and `/high` for k = 1, 2, 4, ..., samples, and those of `calibration`."""
        found = {"eval/unjudged": float(self.unjudged()), "eval/mean_length": self.mean_length}
        found |= {f"eval/{name}": count for name, count in self.reasons.items()}
        if any(c is not None for c in self.correct):
            for k in powers_of_two(self.samples):
                mean, low, high = self.pass_at(k)
                found |= {f"eval/pass@{k}": mean, f"eval/pass@{k}/low": low, f"eval/pass@{k}/high": high}
        best = [right for right in self.most_likely or [] if right is not None]
        if best:
            found[f"eval/best_of@{self.samples}"] = sum(best) / len(best)
        return found | self.of_parts() | self.calibration()

    def of_parts(self) -> dict[str, float]:
        """`eval/<part>/pass@1` with `/low` and `/high` for every part of a mixture."""
        found: dict[str, float] = {}
        for name in dict.fromkeys(self.parts or []):
            correct = [c for c, part in zip(self.correct, self.parts or [], strict=True) if part == name]
            alone = Evaluation(self.samples, correct, {}, 0.0)
            if alone.per_problem(1):
                mean, low, high = alone.pass_at(1)
                key = f"eval/{name}/pass@1"
                found |= {key: mean, f"{key}/low": low, f"{key}/high": high}
        return found

    def judged(self) -> tuple[Tensor, Tensor] | None:
        """Confidence and verdict of every answer that has both, as `rlvr_ops.calibration` takes them; None without any."""
        pairs = [(q, y) for q, y in zip(self.confidences or [], self.verdicts or [], strict=True) if y is not None]
        if not pairs:
            return None
        confidences, verdicts = zip(*pairs, strict=True)
        return torch.tensor(confidences, dtype=torch.float64), torch.tensor(verdicts)

    def calibration(self) -> dict[str, float]:
        """`eval/brier`, `eval/ece`, `eval/auroc` (left out where all answers are right or all wrong), `eval/frac_stated`."""
        judged = self.judged()
        if judged is None or self.confidences is None:
            return {}
        found = {
            "eval/brier": float(rlvr_ops.brier_score(*judged)),
            "eval/ece": float(rlvr_ops.expected_calibration_error(*judged, bins=RELIABILITY_BINS)),
            "eval/auroc": float(rlvr_ops.auroc(*judged)),
            "eval/frac_stated": self.stated / len(self.confidences),
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `Evaluation(**...)` reads it back."""
        return asdict(self)


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n itself.

    >>> powers_of_two(6)
    [1, 2, 4, 6]
    """
    return sorted({n, *(2**i for i in range(n.bit_length()) if 2**i <= n)})


@dataclass
class Answers:
    """`evaluation.samples` completions of every held-out problem, judged, those of a problem next to each other."""

    rollouts: Rollouts
    verdicts: list[Verdict]
    confidences: list[float]
    stated: int

    def rows(self) -> list[dict[str, Any]]:
        """A row for each completion, for JSON Lines."""
        together = zip(self.rollouts.problems, self.rollouts.texts, self.verdicts, self.confidences, strict=True)
        return [
            {
                "where": p.where,
                "task": p.task,
                "prompt": p.text,
                "answer": p.answer,
                "completion": text,
                **asdict(verdict),
                "confidence": round(q, 6),
            }
            for p, text, verdict, q in together
        ]

    def _most_likely(self, samples: int) -> list[bool | None]:
        """Whether the answer that the sampler found likeliest was right: best-of-n without a judge."""
        mask = self.rollouts.completion_mask
        logps = self.rollouts.sampling_logps.nan_to_num(nan=-torch.inf).masked_fill(mask == 0, 0).sum(1) / mask.sum(1)
        best = logps.reshape(-1, samples).argmax(1).tolist()
        scores = [self.verdicts[i * samples + j].score for i, j in enumerate(best)]
        return [None if score is None else score == 1 for score in scores]

    def evaluation(self, samples: int) -> Evaluation:
        """A problem that cannot be judged is not counted at all, neither as solved nor as missed."""
        scores = [verdict.score for verdict in self.verdicts]
        groups = [scores[i : i + samples] for i in range(0, len(scores), samples)]
        names = [problem.task for problem in self.rollouts.problems[::samples]]
        return Evaluation(
            samples=samples,
            correct=[None if None in group else sum(score == 1 for score in group) for group in groups],
            reasons=counts(self.verdicts),
            mean_length=float(self.rollouts.completion_mask.sum(1).float().mean()),
            most_likely=self._most_likely(samples),
            confidences=[round(value, 6) for value in self.confidences],
            verdicts=[None if score is None else score == 1 for score in scores],
            stated=self.stated,
            parts=names if names[0] else None,
        )


def answer(policy: Policy, task: Task, config: Config) -> Answers:
    """Sample `evaluation.samples` answers to every held-out problem, and judge them.

    The random states of training are left alone. The answers' confidences cost one forward pass over them in batches of
    `rollout.batch_size`.
    """
    n, temperature = config.evaluation.samples, config.evaluation.temperature
    state = random.getstate()
    try:
        rollouts = sample(policy, task.held_out, config, n, temperature, config.evaluation.seed)
        confidences, stated = confidences_of(policy, rollouts, temperature, config.rollout.batch_size)
        verdicts = task.score(rollouts.problems, rollouts.texts)
    finally:
        random.setstate(state)
    return Answers(rollouts, verdicts, confidences, stated)


def evaluate(policy: Policy, task: Task, config: Config) -> Evaluation:
    """What the `answer`s to the held-out problems come to."""
    return answer(policy, task, config).evaluation(config.evaluation.samples)


def best_of(rows: list[dict[str, Any]]) -> tuple[int, float] | None:
    """Step and Pass@1 of the best evaluation, the first of equals, among those of `evaluations.jsonl`; None without any."""
    judged = [(row["step"], row["samples"], [c for c in row["correct"] if c is not None]) for row in rows]
    found = [(step, sum(correct) / len(correct) / samples) for step, samples, correct in judged if correct]
    return max(found, key=lambda one: one[1], default=None)


def compare(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Pass@1 after minus before, by paired bootstrap over the problems judged both times, and what to say about it.

    Without such problems it says that alone.
    """
    pairs = [(b, a) for b, a in zip(before.correct, after.correct, strict=True) if b is not None and a is not None]
    if not pairs:
        return {"improved": False, "sentence": "No held-out problem could be judged both before and after."}
    was = [b / before.samples for b, _ in pairs]
    is_now = [a / after.samples for _, a in pairs]
    low, high = paired_bootstrap_interval(was, is_now)
    mean_was, mean_now = sum(was) / len(was), sum(is_now) / len(is_now)
    moved = "rose from" if mean_now > mean_was else "fell from" if mean_now < mean_was else "stayed, from"
    verdict = "an improvement" if low > 0 else "a loss" if high < 0 else "no difference that these problems can show"
    sentence = (
        f"Held-out Pass@1 {moved} {mean_was:.3f} to {mean_now:.3f}: {mean_now - mean_was:+.3f},"
        f" 95 % interval [{low:+.3f}, {high:+.3f}] (paired bootstrap over {len(pairs)} problems): {verdict}."
    )
    return {
        "pass@1_before": mean_was,
        "pass@1_after": mean_now,
        "difference": mean_now - mean_was,
        "difference_low": low,
        "difference_high": high,
        "improved": low > 0,
        "sentence": sentence,
    }

"""The metrics of micro-batches put together into those of the step. `docs/metrics.md` explains every name."""

from torch import Tensor

SUMMED = ("head/rows", "head/rows_scored", "head/rows_pulled_back")
LARGEST = ("ace/weight/max", "sampling/importance_sampling_ratio/max")
LEAST = ("sampling/importance_sampling_ratio/min",)
PER_WRONG_ROLLOUT = (
    "ace/",
    "off_policy/",
)  # everything else under these is a mean over rollouts with a negative advantage


class StepMetrics:
    """Means weighted by what they are means of: tokens, or wrong rollouts. Fetched from the device once, at the end."""

    def __init__(self) -> None:
        self._parts: list[tuple[dict[str, Tensor], float, float]] = []

    def add(self, metrics: dict[str, Tensor], *, tokens: float, wrong: float) -> None:
        """One micro-batch with its count of tokens and of rollouts whose advantage is negative."""
        self._parts.append((metrics, tokens, wrong))

    def result(self) -> dict[str, float]:
        """One number per metric; what has nothing to be a mean of (no wrong rollout at all) is left out."""
        names = dict.fromkeys(name for metrics, _, _ in self._parts for name in metrics)
        found = {name: self._combined(name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def _combined(self, name: str) -> float | None:
        per_wrong = name.startswith(PER_WRONG_ROLLOUT)
        weighted = [
            (float(metrics[name]), wrong if per_wrong else tokens)
            for metrics, tokens, wrong in self._parts
            if name in metrics
        ]
        if name in SUMMED:
            return sum(value for value, _ in weighted)
        total = sum(weight for _, weight in weighted)
        if total == 0:
            return None
        if name in LARGEST + LEAST:
            return (max if name in LARGEST else min)(value for value, weight in weighted if weight > 0)
        return sum(value * weight for value, weight in weighted if weight > 0) / total

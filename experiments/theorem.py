"""Theorem 1 of ACE at work: a training run of a policy that can be enumerated, with both parts of ACE's gradient at each step.

`python -m experiments.theorem` writes `experiments/results/theorem.json`. All answers of one to four tokens are listed, so
every expectation is a sum: no sampling, float64. Twenty-four problems share a policy that is linear in eight features of a
problem, so learning one moves the others, and wrong answers do become likelier. The steps are those of `rlvr_ops.ace_loss`. What
ACE adds to them is -a grad R + a E[1{wrong} sigmoid(c) S] with a = alpha |A-|; see docs/theory.md.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlvr_ops import ace_loss_from_logps

RESULT = Path(__file__).parent / "results" / "theorem.json"
VOCABULARY, LONGEST, PROBLEMS, FEATURES = 4, 4, 24, 8
ALPHA, RATE, STEPS, EVERY = 1.0, 0.5, 400, 4
RUNS = {"GRPO": (0.0, "mean"), "ACE, mean": (ALPHA, "mean"), "ACE, sum": (ALPHA, "sum")}
"""What is trained: alpha, and how c is made from tokens."""


@dataclass(frozen=True)
class World:
    """Problems whose answers are listed.

    Attributes:
        tokens: (answers, T) the token at each place; the last of the vocabulary ends an answer.
        prefixes: (answers, T) which prefix each token follows.
        mask: (answers, T) float64, 1 where there is a token.
        right: (problems, answers) bool.
        features: (problems, F) float64.
    """

    tokens: Tensor
    prefixes: Tensor
    mask: Tensor
    right: Tensor
    features: Tensor

    @classmethod
    def make(cls, generator: torch.Generator) -> "World":
        """All answers over `VOCABULARY` tokens, of which each problem finds about one in twelve right."""
        end = VOCABULARY - 1
        going = [prefix for n in range(LONGEST) for prefix in itertools.product(range(end), repeat=n)]
        full = [(*prefix, token) for prefix in going if len(prefix) == LONGEST - 1 for token in range(end)]
        answers = [*((*prefix, end) for prefix in going), *full]
        place = {prefix: i for i, prefix in enumerate(going)}
        padded = [[*answer, *[0] * (LONGEST - len(answer))] for answer in answers]
        follows = [[place[a[:t]] if t < len(a) else 0 for t in range(LONGEST)] for a in answers]
        mask = [[float(t < len(answer)) for t in range(LONGEST)] for answer in answers]
        right = torch.rand(PROBLEMS, len(answers), generator=generator) < 1 / 12
        features = torch.randn(PROBLEMS, FEATURES, dtype=torch.float64, generator=generator)
        exact = torch.tensor(mask, dtype=torch.float64)
        return cls(torch.tensor(padded), torch.tensor(follows), exact, right, features)

    def logps(self, theta: Tensor) -> Tensor:
        """(problems, answers, T) of every token, for theta (F, prefixes, V)."""
        logits = torch.einsum("pf,fqv->pqv", self.features, theta)
        return logits.log_softmax(-1)[:, self.prefixes, self.tokens] * self.mask


def gradient(world: World, theta: Tensor, ref: Tensor, alpha: float, reduction: str) -> Tensor:
    """The ascent direction of `rlvr_ops.ace_loss` over all answers, by their probability, with GRPO's advantages."""
    logps, mask = world.logps(theta), world.mask.expand(PROBLEMS, -1, -1)
    p = logps.detach().sum(-1).exp()
    loss = ace_loss_from_logps(
        logps.flatten(0, 1),
        (p * advantages(world, p)).flatten(),
        ref_per_token_logps=ref.flatten(0, 1),
        completion_mask=mask.flatten(0, 1),
        alpha=alpha,
        confidence_reduction=reduction,
        loss_type="dr_grpo",
        num_items_in_batch=1,
        max_completion_length=1,
    ).loss
    return -torch.autograd.grad(loss, theta)[0]


def advantages(world: World, p: Tensor) -> Tensor:
    """(problems, answers) of GRPO in a group so large that the pass rate is known."""
    solved = (p * world.right).sum(-1, keepdim=True)
    return (world.right.double() - solved) / (solved * (1 - solved)).sqrt()


def decomposition(world: World, theta: Tensor, ref: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """-a grad R and the residual a E[1{wrong} sigmoid(c) / T S], summed over problems, with a = alpha |A-| a constant."""
    logps = world.logps(theta)
    unit = world.mask.sum(-1) if reduction == "mean" else torch.ones_like(world.mask[:, 0])
    p, log_pi, c = logps.sum(-1).exp(), logps.sum(-1), (logps - ref).sum(-1) / unit
    strength = torch.where(world.right, 0.0, -ALPHA * advantages(world, p.detach()))
    regulariser = (strength * p * softplus(c)).sum()
    residual = (strength * (p * torch.sigmoid(c) / unit).detach() * log_pi).sum()
    return -torch.autograd.grad(regulariser, theta, retain_graph=True)[0], torch.autograd.grad(residual, theta)[0]


def train(alpha: float, reduction: str, seed: int = 0) -> list[dict[str, float]]:
    """Plain gradient ascent, and what was measured every `EVERY` steps."""
    generator = torch.Generator().manual_seed(seed)
    world = World.make(generator)
    shape = FEATURES, int(world.prefixes.max()) + 1, VOCABULARY
    theta = (0.3 * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()
    ref, rows = world.logps(theta).detach(), []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            rows.append({"step": step, **measure(world, theta, ref, reduction)})
        ascent = gradient(world, theta, ref, alpha, reduction) / PROBLEMS
        with torch.no_grad():
            theta += RATE * ascent
    return rows


def measure(world: World, theta: Tensor, ref: Tensor, reduction: str) -> dict[str, float]:
    """Where the policy is, and the norms of what ACE adds there, whether or not it is trained with it.

    solved: the pass rate. overconfident: the share of wrong answers with c > 0, as often as the policy gives them.
    overconfidence: their mean c, per token. ratio: the residual's norm over the regulariser's. cosine: between what ACE adds
    and descent on R. identity: the norm of what ACE adds less both terms, over its own: 0 but for rounding.
    """
    with torch.no_grad():
        logps = world.logps(theta)
        p, c = logps.sum(-1).exp(), (logps - ref).sum(-1) / world.mask.sum(-1)
    wrong = p * ~world.right
    over = wrong * (c > 0)
    added = gradient(world, theta, ref, ALPHA, reduction) - gradient(world, theta, ref, 0.0, reduction)
    regulariser, residual = decomposition(world, theta, ref, reduction)
    return {
        "solved": float((p * world.right).sum(-1).mean()),
        "overconfident": float(over.sum() / wrong.sum()),
        "overconfidence": float((over * c).sum() / over.sum()) if over.any() else 0.0,
        "regulariser": float(regulariser.norm()),
        "residual": float(residual.norm()),
        "ratio": float(residual.norm() / regulariser.norm()),
        "cosine": float(torch.cosine_similarity(added.flatten(), regulariser.flatten(), 0)),
        "identity": float((added - regulariser - residual).norm() / added.norm()),
    }


def main() -> None:
    """Train each of `RUNS`, and keep what was measured."""
    found = {name: train(*run) for name, run in RUNS.items()}
    rounded = {name: [{k: float(f"{v:.6g}") for k, v in row.items()} for row in rows] for name, rows in found.items()}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(rounded, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()

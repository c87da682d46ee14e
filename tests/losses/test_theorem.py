"""Theorem 1 of ACE (arXiv 2602.21420) on a policy small enough to enumerate, exact in float64. See docs/theory.md.

Three tokens, the last of which ends the answer, and at most three of them: 15 answers of length 1, 2 and 3. The policy
is a table of logits, one column per prefix, which is a language-model head W (V, prefixes) on one-hot hidden states.
"""

import itertools

import pytest
import torch
from loss_cases import reference_policy_loss, reference_policy_loss_from_logps
from torch.nn.functional import softplus

import rlvr_ops

VOCABULARY, END, LONGEST = 3, 2, 3
ALPHA, RIGHT_ADVANTAGE, WRONG_ADVANTAGE = 0.7, 0.8, 1.3


def enumerate_answers():
    going = [prefix for n in range(LONGEST) for prefix in itertools.product((0, 1), repeat=n)]
    answers = [(*prefix, END) for prefix in going]
    answers += [(*prefix, token) for prefix in going if len(prefix) == LONGEST - 1 for token in (0, 1)]
    ids = torch.zeros(len(answers), LONGEST, dtype=torch.long)
    mask = torch.zeros(len(answers), LONGEST)
    hidden = torch.zeros(len(answers), LONGEST, len(going), dtype=torch.float64)
    for i, answer in enumerate(answers):
        for t, token in enumerate(answer):
            ids[i, t] = token
            mask[i, t] = 1
            hidden[i, t, going.index(answer[:t])] = 1
    return ids, mask, hidden


class World:
    """A policy theta, a reference, a verdict on every answer, and expectations over all answers."""

    def __init__(self, normalised):
        self.ids, self.mask, self.hidden = enumerate_answers()
        self.theta = torch.randn(VOCABULARY, self.hidden.shape[-1], dtype=torch.float64, requires_grad=True)
        self.ref = self.logps(torch.randn_like(self.theta)).detach()
        self.wrong = torch.rand(len(self.ids)) < 0.6
        self.advantage = torch.full((len(self.ids),), RIGHT_ADVANTAGE, dtype=torch.float64)
        self.advantage[self.wrong] = -WRONG_ADVANTAGE
        self.length = self.mask.sum(dim=1)
        self.unit = self.length if normalised else torch.ones_like(self.length)
        self.logp = self.logps(self.theta)
        self.log_pi = self.logp.sum(dim=1)
        self.p = self.log_pi.exp()
        self.c = (self.logp - self.ref).sum(dim=1) / self.unit

    def logps(self, theta):
        every = (self.hidden @ theta.T).log_softmax(dim=-1)
        return every.gather(-1, self.ids[:, :, None])[:, :, 0] * self.mask

    def gradient(self, scalar):
        return torch.autograd.grad(scalar, self.theta, retain_graph=True)[0]

    def expected_score(self, f):
        """E[f(y) S(y)] with S(y) = grad log pi(y), for a constant f."""
        return self.gradient((self.p.detach() * f.detach() * self.log_pi).sum())

    def over_wrong(self, f):
        return torch.where(self.wrong, f, 0.0)


@pytest.fixture(params=[True, False], ids=["length-normalised", "summed"])
def normalised(request):
    return request.param


@pytest.fixture
def world(normalised):
    return World(normalised)


def test_the_enumeration_is_the_whole_distribution(world):
    assert len(world.ids) == 15
    torch.testing.assert_close(world.p.sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-14)
    assert 0 < int(world.wrong.sum()) < 15
    torch.testing.assert_close(world.expected_score(torch.ones(15)), torch.zeros_like(world.theta), rtol=0, atol=1e-14)


def test_the_regulariser_has_the_gradient_of_the_theorem(world):
    """grad R = E[1{wrong} (softplus(c) + sigmoid(c) / unit) S]."""
    regulariser = (world.p * world.over_wrong(softplus(world.c))).sum()
    by_score = world.expected_score(world.over_wrong(softplus(world.c) + torch.sigmoid(world.c) / world.unit))
    torch.testing.assert_close(world.gradient(regulariser), by_score, rtol=1e-10, atol=1e-12)


def test_the_ace_direction_is_descent_on_the_regulariser_plus_a_residual(world):
    """g = -alpha |A-| grad R + alpha |A-| E[1{wrong} sigmoid(c) / unit S]."""
    strength = ALPHA * WRONG_ADVANTAGE
    g = -strength * world.expected_score(world.over_wrong(softplus(world.c)))
    regulariser = (world.p * world.over_wrong(softplus(world.c))).sum()
    residual = strength * world.expected_score(world.over_wrong(torch.sigmoid(world.c) / world.unit))
    torch.testing.assert_close(g, -strength * world.gradient(regulariser) + residual, rtol=1e-10, atol=1e-12)
    assert residual.norm() > 1e-3  # the residual is really there: without it the identity is false
    assert (g + strength * world.gradient(regulariser)).norm() > 1e-3


def ace_gradient(world, loss, normalised):
    """Descent direction of the ACE loss over all answers, each weighted by its probability, summed over tokens."""
    out = loss(
        world.p.detach() * world.advantage,
        ref_per_token_logps=world.ref,
        completion_mask=world.mask,
        alpha=ALPHA,
        confidence_reduction="mean" if normalised else "sum",
        loss_type="dr_grpo",
        num_items_in_batch=1,
        max_completion_length=1,
    )
    return -world.gradient(out.loss)


def expected_gradient(world):
    """E[A S], the policy gradient, plus g, what ACE adds to it."""
    g = -ALPHA * WRONG_ADVANTAGE * world.expected_score(world.over_wrong(softplus(world.c)))
    return world.expected_score(world.advantage) + g


def two_pass(*args, **kwargs):
    return rlvr_ops.ace_loss(*args, schedule="two_pass", **kwargs)


FROM_LOGPS = {"reference": reference_policy_loss_from_logps, "rlvr_ops": rlvr_ops.ace_loss_from_logps}
FROM_HIDDEN = {"reference": reference_policy_loss, "single_pass": rlvr_ops.ace_loss, "two_pass": two_pass}


@pytest.mark.parametrize("name", FROM_LOGPS)
def test_the_loss_from_logps_has_the_policy_gradient_plus_g(world, normalised, name):
    got = ace_gradient(world, lambda a, **kw: FROM_LOGPS[name](world.logp, a, **kw), normalised)
    torch.testing.assert_close(got, expected_gradient(world), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FROM_HIDDEN)
def test_the_loss_from_hidden_states_has_the_policy_gradient_plus_g(world, normalised, name):
    got = ace_gradient(
        world, lambda a, **kw: FROM_HIDDEN[name](world.hidden, world.theta, world.ids, a, **kw), normalised
    )
    torch.testing.assert_close(got, expected_gradient(world), rtol=1e-10, atol=1e-12)

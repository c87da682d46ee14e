"""Two slices of a vocabulary that talk only where `Shard` says give what the whole vocabulary gives."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rlvr_kernels.logits import LogitMap
from rlvr_kernels.lse_fold import RowState
from rlvr_kernels.objective import KL, Ace, TokenObjective
from rlvr_kernels.pull_back import Needs, pull_back
from rlvr_kernels.score import score
from rlvr_kernels.single_pass import single_pass
from rlvr_kernels.surrogates import Clip
from rlvr_kernels.weigh import Rows, weigh

N, H, V, CUT = 11, 6, 97, 40
NEEDS = Needs(True, True, True)


class Exchange:
    """What the ranks, here threads, put on the table; each takes all of it."""

    def __init__(self, ranks):
        self.barrier, self.table, self.rounds = threading.Barrier(ranks), {}, 0

    def all(self, rank, value):
        self.table[rank] = value
        self.barrier.wait()
        found = [self.table[r] for r in sorted(self.table)]
        self.rounds += rank == 0
        self.barrier.wait()
        return found


class ThreadShard:
    def __init__(self, exchange, rank, first):
        self.exchange, self.rank, self.first = exchange, rank, first

    def combine(self, state):
        states = self.exchange.all(self.rank, state)
        maximum = torch.stack([s.maximum for s in states]).amax(0)
        total = sum(s.total * (s.maximum - maximum).exp() for s in states)
        return RowState(maximum, total, torch.stack([s.target for s in states]).amax(0))

    def total(self, d_hidden):
        return sum(self.exchange.all(self.rank, d_hidden))


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    ids = torch.randint(V, (N,), generator=g)
    rows = Rows(
        normal(N), torch.tensor([0, 4, 4, N]), torch.full((3,), 0.2, dtype=torch.float64), normal(N) - 4, normal(N) - 4
    )
    return normal(N, H), normal(V, H), normal(V), ids, rows, torch.linspace(0.6, 1.4, N, dtype=torch.float64)


def step(schedule, hidden, weight, bias, ids, rows, inv_temperature, shard=None):
    """(logp, sums, d_hidden, d_weight, d_bias) of a loss that needs whole rollouts."""
    objective = TokenObjective(Clip(), Ace(1.0), KL("k3", 0.1))
    logit_map = LogitMap(inv_temperature, bias, 0.9, 5.0)
    room = {"workspace_bytes": 8 * N * 17, "backend": "torch", "shard": shard}
    if schedule == "single_pass":
        del room["workspace_bytes"]
        done = single_pass(
            hidden, weight, ids, logit_map, rows, lambda logp, part: weigh(logp, part, objective), token_local=False,
            needs=NEEDS, weight_dtype=weight.dtype, chunk_rows=8, **room,
        )  # fmt: skip
        return done.logp, done.sums, *done.gradients
    scores = score(hidden, weight, ids, logit_map, **room)
    _, coef, sums = weigh(scores.logp, rows, objective)
    found = pull_back(hidden, weight, ids, logit_map, scores.lse, coef, needs=NEEDS, weight_dtype=weight.dtype, **room)
    return scores.logp, sums, *found


@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
def test_two_slices_give_what_the_whole_vocabulary_gives(schedule, problem):
    hidden, weight, bias, *rest = problem
    logp, sums, d_hidden, d_weight, d_bias = step(schedule, *problem)
    exchange = Exchange(2)

    def rank(number):
        part = slice(0, CUT) if number == 0 else slice(CUT, V)
        shard = ThreadShard(exchange, number, part.start)
        return part, step(schedule, hidden, weight[part], bias[part], *rest, shard=shard)

    with ThreadPoolExecutor(2) as threads:
        for part, found in threads.map(rank, range(2)):
            for got, truth in zip(found, (logp, sums, d_hidden, d_weight[part], d_bias[part]), strict=True):
                torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-13)
    chunks = 2 if schedule == "single_pass" else 1
    assert exchange.rounds == chunks + 1, "once a chunk after scoring, once after pulling back, and nowhere else"

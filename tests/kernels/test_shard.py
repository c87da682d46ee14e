"""Two slices of a vocabulary that talk only where `Shard` says give what the whole vocabulary gives."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from rlvr_kernels.linear_exp import linear_exp
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
    """What the ranks, here threads, put on the table; each takes all of it. They work one at a time: Triton's interpreter has
    one state."""

    def __init__(self, ranks):
        self.barrier, self.table, self.rounds, self.turn = threading.Barrier(ranks), {}, 0, threading.Lock()

    def all(self, rank, value):
        self.table[rank] = value
        self.turn.release()
        self.barrier.wait()
        found = [self.table[r] for r in sorted(self.table)]
        self.barrier.wait()
        self.turn.acquire()
        self.rounds += rank == 0
        return found


class ThreadShard:
    def __init__(self, exchange, rank, first):
        self.exchange, self.rank, self.first = exchange, rank, first

    def combine(self, state):
        states = self.exchange.all(self.rank, state)
        maximum = torch.stack([s.maximum for s in states]).amax(0)
        total = sum(s.total * (s.maximum - maximum).exp() for s in states)
        return RowState(maximum, total, torch.stack([s.target for s in states]).amax(0))

    def total(self, values):
        return sum(self.exchange.all(self.rank, values.clone()))


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


def step(schedule, hidden, weight, bias, ids, rows, inv_temperature, shard=None, backend="torch", softcap=5.0):
    """(logp, sums, d_hidden, d_weight, d_bias) of a loss that needs whole rollouts."""
    objective = TokenObjective(Clip(), Ace(1.0), KL("k2", 0.1))  # k3 of a token that cannot be is inf in float32
    logit_map = LogitMap(inv_temperature, bias, 0.9, softcap)
    room = {"workspace_bytes": 8 * N * 17, "backend": backend, "shard": shard}
    if schedule == "single_pass":
        del room["workspace_bytes"]
        done = single_pass(
            hidden, weight, ids, logit_map, rows, lambda logp, part: weigh(logp, part, objective, backend), token_local=False,
            needs=NEEDS, weight_dtype=weight.dtype, chunk_rows=8, **room,
        )  # fmt: skip
        return done.logp, done.sums, *done.gradients
    scores = score(hidden, weight, ids, logit_map, **room)
    _, coef, sums = weigh(scores.logp, rows, objective, backend)
    found = pull_back(hidden, weight, ids, logit_map, scores.lse, coef, needs=NEEDS, weight_dtype=weight.dtype, **room)
    return scores.logp, sums, *found


def shards_of(schedule, problem, **options):
    """What two ranks give, and how often they talked."""
    hidden, weight, bias, *rest = problem
    exchange = Exchange(2)

    def rank(number):
        part = slice(0, CUT) if number == 0 else slice(CUT, V)
        shard = ThreadShard(exchange, number, part.start)
        with exchange.turn:
            return part, step(schedule, hidden, weight[part], bias[part], *rest, shard=shard, **options)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(rank, range(2))), exchange.rounds


def check(found, expected, **close):
    logp, sums, d_hidden, d_weight, d_bias = expected
    for part, mine in found:
        for got, truth in zip(mine, (logp, sums, d_hidden, d_weight[part], d_bias[part]), strict=True):
            torch.testing.assert_close(got.double(), truth, **close)


@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
def test_two_slices_give_what_the_whole_vocabulary_gives(schedule, problem):
    found, rounds = shards_of(schedule, problem)
    check(found, step(schedule, *problem), rtol=1e-12, atol=1e-13)
    chunks = 2 if schedule == "single_pass" else 1
    assert rounds == chunks + 1, "once a chunk after scoring, once after pulling back, and nowhere else"


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
def test_two_slices_of_exponentials_give_what_the_whole_vocabulary_gives(schedule, far, problem, monkeypatch):
    """Also where a target's logit is no anchor."""
    monkeypatch.setattr("rlvr_kernels.tile.BY_TRITON", {torch.float32})
    monkeypatch.setattr("rlvr_kernels.score.IN_REGISTERS", {torch.float32})
    hidden, weight, bias, ids, rows, inv_temperature = problem
    if far:
        bias[50] += 200
    expected = step(schedule, hidden, weight, bias, ids, rows, inv_temperature, softcap=None)
    low = replace(rows, **{n: getattr(rows, n).float() for n in ("advantages", "weights", "old", "ref")})
    narrow = [x.float() for x in (hidden, weight, bias)], ids, low, inv_temperature.float()
    found, rounds = shards_of(schedule, (*narrow[0], *narrow[1:]), backend="triton", softcap=None)
    check(found, expected, rtol=1e-4, atol=1e-4 if far else 1e-5)
    assert rounds == (3 * 2 + 1 if schedule == "single_pass" else 2), (
        "anchors, sums, and the log-sum-exps of flagged rows"
    )


@pytest.mark.interpret
def test_only_the_slice_with_the_target_makes_up_for_its_rounding(problem):
    hidden, weight, _, ids, _, inv_temperature = problem
    hidden, weight, exchange = hidden.bfloat16(), weight.bfloat16(), Exchange(2)
    lse = ((hidden.double() @ weight.double().T) * inv_temperature[:, None]).logsumexp(1)

    def rank(number):
        part = slice(0, CUT) if number == 0 else slice(CUT, V)
        out, shard = torch.empty(N, part.stop - part.start).bfloat16(), ThreadShard(exchange, number, part.start)
        given = hidden, weight[part], ids - part.start, LogitMap(inv_temperature.float())
        with exchange.turn:
            return out, linear_exp(*given, out, shard=shard, backend="triton")

    with ThreadPoolExecutor(2) as threads:
        halves = list(threads.map(rank, range(2)))
    for row, target in enumerate(ids.tolist()):
        (own, mine), (_, other) = halves if target < CUT else halves[::-1]
        entry = own[row, target if target < CUT else target - CUT].double() / mine.total[row].double()
        torch.testing.assert_close(entry, mine.logp[row].double().expm1(), rtol=1e-5, atol=0)
        torch.testing.assert_close((other.anchor + other.total.log())[row].double(), lse[row], rtol=0, atol=1e-5)

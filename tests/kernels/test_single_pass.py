"""A single pass over whole rows: what it leaves in a tile, and all of it against float64."""

from itertools import pairwise

import pytest
import torch
from kernel_cases import BACKENDS, CLIPS, COLS, HEADS, OTHERS, ROWS, make_rows, policy_rows, truth
from rlvr_kernels.dlogits import dlogits
from rlvr_kernels.linear_exp import linear_exp
from rlvr_kernels.logits import LogitMap
from rlvr_kernels.lse_fold import RowState, lse_fold
from rlvr_kernels.pull_back import Needs
from rlvr_kernels.single_pass import rollout_chunks, single_pass
from rlvr_kernels.weigh import Rows, weigh

HIDDEN = 11
TOKEN_LOCAL = [objective for objective in CLIPS[::3] + OTHERS if objective.is_token_local(has_old=True)]


def scored(raw, ids, logit_map, backend="torch"):
    state = RowState.empty(len(ids), raw)
    lse_fold(raw, ids, 0, state, logit_map, backend)
    return state


@pytest.mark.parametrize(
    ("lengths", "limit", "enough", "rows"),
    [
        ([128] * 8, 517, 517, [512, 512]),
        ([96] * 8, 517, 517, [384, 384]),
        ([128] * 8, 414, 414, [384, 384, 256]),
        ([300, 300, 300], 517, 517, [300, 300, 300]),
        ([512] * 4, 9000, 1024, [1024, 1024]),
        ([3000, 10, 2000], 9000, 1024, [3000, 10, 2000]),
        ([0, 5, 0, 7], 12, 12, [12]),
        ([], 12, 12, []),
    ],
)
def test_whole_rollouts_are_dealt_out_evenly_over_as_few_chunks_as_there_must_be(lengths, limit, enough, rows):
    chunks = list(rollout_chunks(lengths, limit, enough))
    assert [part.stop - part.start for part in chunks] == rows
    assert all(after.start == before.stop for before, after in pairwise(chunks))


@pytest.mark.parametrize("head", HEADS)
def test_log_probabilities_of_a_single_pass_have_the_bits_of_scoring(head):
    """So that a policy and its reference agree exactly where they are one."""
    raw, ids, inv_temperature, bias = make_rows(spread=1.0)
    logit_map, state = LogitMap(inv_temperature, bias, **head), RowState.empty(ROWS, raw, entropy=True)
    lse_fold(raw, ids, 0, state, logit_map, "torch")
    found = linear_exp(torch.eye(ROWS), raw.T.contiguous(), ids, logit_map, torch.empty_like(raw), entropy=True)
    assert torch.equal(found.logp, state.logp())
    assert torch.equal(found.entropy, state.entropy())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("objective", CLIPS[::3] + OTHERS, ids=str)
@pytest.mark.parametrize("has_old", [True, False])
def test_scoring_weighing_and_pulling_back_agree_with_float64(backend, head, objective, has_old):
    raw, ids, inv_temperature, bias = make_rows(spread=1.0)
    cu_seqlens, weights = torch.tensor([0, 2, 2, ROWS]), torch.linspace(0.2, 1.0, 3)
    _, noise, gap, advantages = policy_rows()
    near = truth(raw, LogitMap(inv_temperature, bias, **head)).log_softmax(-1).gather(1, ids[:, None])[:, 0].float()

    def step(dtype, backend):
        old, ref, *others = (x.to(dtype) for x in (near + noise / 5, near + gap / 9, raw, inv_temperature, bias))
        tile, logit_map = others[0].clone(), LogitMap(*others[1:], **head)
        state = scored(tile, ids, logit_map, backend)
        rows = Rows(advantages.to(dtype), cu_seqlens, weights.to(dtype), old if has_old else None, ref)
        weighed = weigh(state.logp(), rows, objective, backend)
        gradient = dlogits(tile, ids, 0, state.lse(), weighed.coef, logit_map, backend=backend)
        return {"logp": state.logp(), "lse": state.lse(), **weighed._asdict(), "gradient": gradient}

    found, expected = step(torch.float32, backend), step(torch.float64, "torch")
    for name, b in expected.items():
        torch.testing.assert_close(found[name].double(), b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("objective", TOKEN_LOCAL, ids=str)
@pytest.mark.parametrize("rows_at_once", [2, ROWS])
def test_a_single_pass_gives_what_the_three_kernels_give(backend, head, objective, rows_at_once):
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(ROWS, HIDDEN, generator=g), torch.randn(COLS, HIDDEN, generator=g) / HIDDEN**0.5
    _, ids, inv_temperature, bias = make_rows()
    logit_map, raw = LogitMap(inv_temperature, bias, **head), hidden @ weight.T
    state = scored(raw, ids, logit_map)
    _, noise, gap, advantages = policy_rows()
    logp = state.logp()
    rows = Rows(
        advantages, torch.tensor([0, 2, 2, ROWS]), torch.linspace(0.2, 1.0, 3), logp + noise / 5, logp + gap / 9
    )
    weighed = weigh(logp, rows, objective, "torch")
    gradient = dlogits(raw, ids, 0, state.lse(), weighed.coef, logit_map, backend="torch")
    chunks = []

    def weigher(logp, part):
        chunks.append(weigh(logp, part, objective, backend))
        return chunks[-1]

    done = single_pass(
        hidden, weight, ids, logit_map, rows, weigher, token_local=True, needs=Needs(True, True, True),
        weight_dtype=torch.float32, chunk_rows=rows_at_once, backend=backend,
    )  # fmt: skip
    expected = {"logp": logp, **weighed._asdict(), "active": (weighed.coef != 0).sum().float()}
    found = {name: torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("losses", "coef")}
    found |= {name: getattr(done, name) for name in ("logp", "sums", "active")}
    expected |= {"d_hidden": gradient @ weight, "d_weight": gradient.T @ hidden, "d_bias": gradient.sum(0)}
    found |= {f"d_{name}": x for name, x in done.gradients._asdict().items()}
    assert len(chunks) == -(-ROWS // rows_at_once)
    for name, b in expected.items():
        torch.testing.assert_close(found[name], b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")

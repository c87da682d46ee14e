"""weigh: the Triton kernel under the interpreter against its twin in float64, and both where numbers are extreme."""

import pytest
import torch
from kernel_cases import BACKENDS, OBJECTIVES, ROWS, objective, policy_rows
from rlvr_kernels.objective import KL, Ace
from rlvr_kernels.surrogates import Clip
from rlvr_kernels.weigh import SUMS, Rows, rollout_sums, weigh

INF = float("inf")


@pytest.mark.interpret
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_kernel_agrees_with_its_twin_in_float64(objective, has_old, masked):
    n = 2500  # the longest rollout takes three blocks
    logp, old, ref, advantages = policy_rows(rows=n)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(3)) > 0.4 if masked else None
    if mask is not None:
        logp, ref = (torch.where(mask, x, float("nan")) for x in (logp, ref))
    sampling = logp + 0.1 * ref  # unknown for some tokens
    sampling[::7] = float("nan")
    given = advantages, torch.linspace(0.1, 0.5, 5), old if has_old else None, ref, sampling

    def rows(values):
        advantages, weights, old, ref, sampling = values
        return Rows(advantages, torch.tensor([0, 3, 3, 20, 2400, n]), weights, old, ref, sampling, mask)

    found = weigh(logp, rows(given), objective, "triton")
    expected = weigh(logp.double(), rows([None if x is None else x.double() for x in given]), objective, "torch")
    for name, a, b in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rollouts_sums_are_plain_sums_over_its_unmasked_tokens(backend):
    logp = torch.tensor([-1.0, -2.0, -3.0, -1.0, -1.0])
    rows = Rows(
        torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0]), torch.tensor([0, 4, 5]), torch.tensor([0.5, 1.0]),
        old=logp - torch.tensor([0.0, 1.0, -1.0, 5.0, 0.0]), ref=logp - torch.tensor([1.0, 2.0, 3.0, 9.0, 4.0]),
        mask=torch.tensor([True, True, True, False, True]),
    )  # fmt: skip
    strict = objective(Clip(0.2), kl=KL("k1"), threshold=0.0)
    expected = {
        "loss": [0.5 * (-1 - 1.2 + 0.8), -1.0], "tokens": [3.0, 1.0], "wrong": [1.0, 0.0], "shift": [6.0, 4.0],
        "kl": [6.0, 4.0], "clipped_low": [1.0, 0.0], "clipped_high": [1.0, 0.0], "dropped": [0.0, 0.0],
    }  # fmt: skip
    found = weigh(logp, rows, strict, backend).sums
    torch.testing.assert_close(found, torch.tensor([expected[name] for name in SUMS]).T, rtol=1e-6, atol=1e-6)
    dropped = weigh(logp - 0.1, rows, strict, backend).sums[:, SUMS.index("dropped")]
    assert dropped.tolist() == [3.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sums_of_parts_of_a_rollout_add_up(backend):
    logp, old, ref, advantages = policy_rows(rows=40)
    rows = Rows(advantages, torch.tensor([0, 13, 13, 40]), torch.tensor([0.1, 0.2, 0.3]), old, ref)
    local = objective(Clip(0.05), kl=KL("k3", 0.1))
    whole = weigh(logp, rows, local, backend)
    parts = [weigh(logp[part], rows[part], local, backend) for part in (slice(0, 20), slice(20, 40))]
    torch.testing.assert_close(parts[0].sums + parts[1].sums, whole.sums, rtol=1e-6, atol=1e-6)
    assert torch.cat([part.coef for part in parts]).equal(whole.coef)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_divergence_that_overflows_does_not_reach_a_loss_without_it(backend):
    """exp(ref - logp) is infinite in float32 for a token that the policy has all but ruled out."""
    logp, ref = torch.tensor([-95.0, -1.0]), torch.tensor([-1.0, -1.0])
    rows = Rows(torch.tensor([1.0, -1.0]), torch.tensor([0, 2]), torch.tensor([0.5]), logp, ref)
    found = weigh(logp, rows, objective(Clip(), ace=Ace(1.0)), backend)
    torch.testing.assert_close(found.losses, torch.tensor([-0.5, 0.5]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.coef, torch.tensor([-0.5, 0.5]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("estimator", "logp", "old", "ref", "kl"),
    [
        ("k3", -120.0, -1.0, -1.0, 1.0),  # r exp(d) = exp(ref - old); r itself is 0 in float32, and exp(d) is infinite
        ("k3", -91.0, -1.0, -1.0, 1.0),
        ("k3", -1.0, -120.0, -1.0, 0.0),  # r is infinite, and the policy is the reference
        ("k3", -INF, -2.0, -1.0, 2.7182818),
        *((estimator, logp, -1.0, -1.0, 0.0) for estimator in ("k1", "k2") for logp in (-120.0, -91.0, -INF)),
        *((estimator, -1.0, -120.0, -1.0, 0.0) for estimator in ("k1", "k2")),
    ],
)
def test_a_corrected_divergence_is_right_where_the_ratio_leaves_float32(estimator, logp, old, ref, kl, backend):
    rows = Rows(
        torch.zeros(2), torch.tensor([0, 2]), torch.ones(1), torch.tensor([old, -1.0]), torch.tensor([ref, -1.0])
    )
    corrected = objective(Clip(), kl=KL(estimator, 1.0, bias_correction=True))
    found = weigh(torch.tensor([logp, -1.0]), rows, corrected, backend)
    torch.testing.assert_close(found.losses, torch.tensor([kl, 0.0]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.coef, torch.zeros(2), rtol=0, atol=1e-6)


@pytest.mark.interpret
def test_every_element_is_written(monkeypatch):
    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float("nan"))

    empty = torch.empty
    logp, old, ref, advantages = policy_rows()
    monkeypatch.setattr(torch, "empty", poisoned)
    rows = Rows(advantages, torch.tensor([0, 2, 2, ROWS]), torch.ones(3), old, ref)
    assert all(torch.isfinite(x).all() for x in weigh(logp, rows, objective(Clip(), ace=Ace(1.0)), "triton"))


def test_a_million_equal_tokens_add_up():
    sums = rollout_sums(torch.full((10**6 + 3,), 0.1), torch.tensor([0, 10**6, 10**6, 10**6 + 3]))
    torch.testing.assert_close(sums.double(), torch.tensor([1e5, 0.0, 0.3]).double(), rtol=1e-6, atol=0)

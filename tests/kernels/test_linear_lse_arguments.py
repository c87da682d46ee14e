"""What linear_lse refuses, and what its messages say."""

import pytest
import torch
from rlvr_kernels.linear_lse import linear_lse


def make():
    return torch.randn(37, 40), torch.randn(131, 40), torch.randint(0, 131, (37,))


def test_a_float64_tensor_never_reaches_the_kernels():
    hidden, weight, ids = make()
    with pytest.raises(ValueError, match="cannot run here"):
        linear_lse(hidden.double(), weight, ids, backend="triton")


def bad(name, value):
    def case(tensors):
        tensors[name] = value(tensors)
        return tensors

    return case


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bad("hidden", lambda t: t["hidden"][None]), r"hidden must have shape \(N, H\), got \(1, 37, 40\)"),
        (bad("weight", lambda t: t["weight"].T), r"weight must have shape \(V, H\) = \(V, 40\) .* got \(40, 131\)"),
        (bad("ids", lambda t: t["ids"][1:]), r"ids must have shape \(37,\), got \(36,\)"),
        (bad("ids", lambda t: t["ids"].float()), "ids must be int64 or int32, got torch.float32"),
        (bad("bias", lambda t: torch.zeros(3)), r"bias must have shape \(131,\), got \(3,\)"),
        (bad("weight", lambda t: t["weight"].int()), "weight must be floating point, got torch.int32"),
        (bad("weight", lambda t: t["weight"].to("meta")), "weight must be on cpu like hidden, got meta"),
        (
            bad("temperature", lambda t: torch.ones(3)),
            r"temperature must be a number or have shape \(N,\) = \(37,\), got \(3,\)",
        ),
        (bad("temperature", lambda t: 0.0), "temperature must be > 0, got 0.0"),
        (bad("softcap", lambda t: -1.0), "softcap must be > 0 and finite, or None, got -1.0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_lse(**change(dict(zip(("hidden", "weight", "ids"), make(), strict=True))))

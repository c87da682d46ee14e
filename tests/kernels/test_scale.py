"""scale_ under the interpreter and as a twin."""

import pytest
import torch
from rlvr_kernels import scale
from rlvr_kernels.scale import scale_

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpret)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (70, 311)])
def test_every_value_is_multiplied_in_float32_and_rounded_once(dtype, shape, backend, monkeypatch):
    monkeypatch.setattr(scale, "BLOCK", 1024)
    monkeypatch.setattr(scale, "TWIN_ELEMENTS", 1000)
    values = torch.randn(shape).to(dtype)
    expected = (values.float() * 1.7).to(dtype)
    assert scale_(values, torch.tensor([1.7]), backend) is values
    cut = backend == "triton" and dtype == torch.bfloat16  # Triton's interpreter drops the bits that a GPU rounds
    torch.testing.assert_close(values, expected, rtol=2**-7 if cut else 0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_scale_that_the_values_could_not_hold_still_multiplies_them(backend):
    values = torch.tensor([2.0**-14], dtype=torch.float16)
    scale_(values, torch.tensor([2.0**17]), backend)  # inf in float16
    assert float(values) == 8.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_factor_that_is_not_a_number_is_not_passed_over(backend):
    assert scale_(torch.ones(3), torch.tensor([float("nan")]), backend).isnan().all()


def test_a_factor_of_one_leaves_the_memory_alone():
    values = torch.ones(4)
    version = values._version
    scale_(values, torch.ones(1))
    assert values._version == version

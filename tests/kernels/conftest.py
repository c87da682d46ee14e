"""How the kernels that multiply read their operands."""

import pytest
from rlvr_kernels import gemm


@pytest.fixture
def backend(request, monkeypatch):
    """What to pass as backend=, once the kernel is told how to read its operands: rows of 40 may be read either way."""
    if request.param == "pointers":
        monkeypatch.setattr(gemm, "_describable", lambda matrix: False)
    return "torch" if request.param == "torch" else "triton"

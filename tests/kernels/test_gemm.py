"""The table of tilings: which operands are read by descriptors, and what a GPU should compare."""

import pytest
import torch
from rlvr_kernels.gemm import FOLD, FOLD_CANDIDATES, LEAVE, LEAVE_CANDIDATES, tiling


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("operand", "described"),
    [
        (torch.zeros(4, 40, dtype=torch.bfloat16), True),
        (torch.zeros(4, 44, dtype=torch.bfloat16), False),  # rows that begin at 8 bytes
        (torch.zeros(5, 40, dtype=torch.bfloat16).flatten()[4:164].view(4, 40), False),  # so does the first
        (torch.zeros(40, 8, dtype=torch.bfloat16).T, False),
        (torch.zeros(4, 80, dtype=torch.bfloat16)[:, ::2], False),
        (torch.zeros(1, 40, dtype=torch.bfloat16).expand(4, 40), False),
        (torch.zeros(4, 80, dtype=torch.bfloat16)[:, :20], True),
        (torch.zeros(4, 0, dtype=torch.bfloat16), False),
    ],
    ids=["dense", "narrow", "shifted", "transposed", "strided", "expanded", "part of wider rows", "empty"],
)
def test_descriptors_stand_for_aligned_dense_rows_alone(operand, described):
    assert tiling(operand, operand).described is described


@pytest.mark.parametrize("target", FOLD)
@pytest.mark.parametrize(("chosen", "candidates"), [(FOLD, FOLD_CANDIDATES), (LEAVE, LEAVE_CANDIDATES)])
def test_what_is_launched_is_the_first_of_the_candidates(target, chosen, candidates):
    assert candidates[target][0] == chosen[target]
    assert len(set(candidates[target])) == len(candidates[target])
    assert all(tile.described and not tile.upcast for tile in candidates[target])

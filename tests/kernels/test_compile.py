"""Every Triton kernel, compiled for every GPU that the library is for, on a machine that has none of them."""

import os
import re
from pathlib import Path

import pytest
import rlvr_kernels
from rlvr_kernels.compile_table import TARGETS, Usage, compile_all, recorded, table
from rlvr_kernels.launches import LAUNCHES

ROOT = Path(__file__).parents[2]
NVIDIA = [name for name, target in TARGETS.items() if target.backend == "cuda"]


@pytest.fixture(scope="module")
def usages(request):
    found = compile_all(processes=os.cpu_count() or 1)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\nregisters / stack / KiB of shared memory (warps)", table(found), sep="\n")
    return found


def on(usages, target):
    return [usage for usage in usages if usage.target == target]


@pytest.mark.compile
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_compiles_for_every_target(usages, target):
    assert {usage.variant for usage in on(usages, target)} == set(LAUNCHES)


@pytest.mark.compile
@pytest.mark.parametrize("target", NVIDIA)
def test_no_register_spills_on_nvidia(usages, target):
    assert [usage for usage in on(usages, target) if usage.stack] == []


@pytest.mark.compile
@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_is_inside_the_targets_limit(usages, target):
    limit = TARGETS[target].shared_limit
    assert [usage for usage in on(usages, target) if usage.shared > limit] == []


@pytest.mark.compile
@pytest.mark.parametrize(
    ("target", "unit"), [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05"), ("gfx942", "mfma")]
)
def test_half_precision_goes_to_the_tensor_cores(usages, target, unit):
    used = {
        u.matrix_unit for u in on(usages, target) if u.kernel == "linear_lse_kernel" and u.variant == "linear_lse bf16"
    }
    assert used == {unit}


@pytest.mark.compile
@pytest.mark.parametrize("target", NVIDIA)
def test_float32_is_never_rounded_to_tf32(usages, target):
    assert [u for u in on(usages, target) if "fp32" in u.variant and u.matrix_unit] == []


@pytest.mark.compile
def test_the_losses_that_most_people_train_do_not_pay_for_the_others(usages):
    """Registers per thread on sm_90, before the kernels knew more than a clip: within 3 % of that."""
    before = {
        "weigh GRPO on policy": 96,
        "weigh ACE, KL, mask": 114,
        "fused_policy fp32 GRPO on policy": 40,
        "fused_policy fp32 deferred": 40,
        "fused_policy bf16 ACE, KL, bias, softcap": 74,
    }
    now = {usage.variant: usage.registers for usage in on(usages, "sm_90") if usage.variant in before}
    assert now.keys() == before.keys()
    assert {name: count for name, count in now.items() if count > 1.03 * before[name]} == {}


@pytest.mark.compile
def test_every_kernel_that_the_library_launches_is_compiled(usages):
    source = "".join(path.read_text() for path in Path(rlvr_kernels.__path__[0]).glob("*.py"))
    launched = set(re.findall(r"\b(\w+_kernel)\[", source))
    assert {usage.kernel for usage in usages} == launched


def test_the_documented_table_has_the_registrys_variants_and_targets():
    text = (ROOT / "docs" / "kernels.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "_kernel " in line]
    rows = [row for row in rows if len(row) == 2 + len(TARGETS)]
    header = next(line for line in text.splitlines() if line.startswith("| variant"))
    assert {row[0] for row in rows} == set(LAUNCHES)
    assert [cell.strip() for cell in header.split("|")[3:-1]] == list(TARGETS)
    spilled = [row for row in rows for cell in row[2 : 2 + len(NVIDIA)] if cell and cell.split(" / ")[1] != "0"]
    assert spilled == []


def test_the_table_names_a_second_kernel_once():
    rows = [Usage(v, k, "sm_90", 4, 32, 0, 2048, "") for v in ("a", "b") for k in ("main_kernel", "combine_kernel")]
    assert table(rows).splitlines() == [
        "variant  kernel          sm_90",
        "a        main_kernel     32 / 0 / 2 (4)",
        "a        combine_kernel  32 / 0 / 2 (4)",
        "b        main_kernel     32 / 0 / 2 (4)",
    ]


@pytest.mark.interpret
def test_an_interpreted_kernel_cannot_be_compiled():
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET=1"), recorded(TARGETS["sm_90"]):
        pass

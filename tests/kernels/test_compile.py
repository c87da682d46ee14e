"""Every Triton kernel, compiled for every GPU that the library is for, on a machine that has none of them."""

import os
import re
from pathlib import Path

import pytest
import rlvr_kernels
from rlvr_kernels._triton import triton
from rlvr_kernels.gemm import HOPPER, LEAVE

from tools.compile_table import LEGEND, PAGE, RECORD, Usage, compile_all, load, recorded, table, with_table
from tools.compile_targets import TARGETS, occupancy
from tools.launches import LAUNCHES

ROOT = Path(__file__).parents[2]
NVIDIA = [name for name, target in TARGETS.items() if target.backend == "cuda"]


@pytest.fixture(scope="module")
def usages(request):
    found = compile_all(processes=os.cpu_count() or 1)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{LEGEND}", table(found), sep="\n")
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
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_half_precision_is_read_by_bulk_copies_while_the_tensor_cores_multiply(usages, target):
    found = [
        u for u in on(usages, target) if u.kernel == "linear_lse_kernel" and u.variant.startswith("linear_lse bf16")
    ]
    found = [u for u in found if "odd H" not in u.variant and "fp32" not in u.variant]
    assert len(found) == 5
    assert all(u.bulk_copies >= 2 for u in found)
    if target == "sm_90":
        assert {u.in_flight for u in found} == {1}  # the loop waits for the product before the one it has just begun


@pytest.mark.compile
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_a_tile_of_exponentials_is_read_and_written_by_bulk_copies(usages, target):
    found = [u for u in on(usages, target) if u.kernel.startswith("linear_exp_kernel") and "odd H" not in u.variant]
    assert len(found) == 5 * 2 + 3
    assert all(u.bulk_copies >= 2 for u in found)
    if target == "sm_90":
        assert {u.in_flight for u in found if not u.kernel.endswith("2")} == {1}
        for usage in found:
            counts = {name: int(n) for n, name in re.findall(r"(\d+) ([A-Z]+)", usage.instructions)}
            tile = LEAVE[HOPPER]
            assert counts["HGMMA"] == tile.inner // 16, "one step over H of a tile, a warpgroup's half of its rows"
            assert counts["UTMALDG"] == 2 * tile.num_stages, "both operands, for the first steps and for each of a loop"
            assert counts["UTMASTG"] == tile.parts
            assert counts["STSM"] == tile.cols // 16


@pytest.fixture(scope="module")
def recorded_usages():
    version, rows = load(ROOT / RECORD)
    if triton.__version__ != version:
        pytest.skip(
            f"the record is of Triton {version}, this is {triton.__version__}: other figures, and nothing to compare"
        )
    return rows


@pytest.mark.compile
def test_no_kernel_takes_more_than_was_recorded(usages, recorded_usages):
    """Up to a tenth more registers; python -m tools.compile_table --record, if it is meant."""
    before = {(u.variant, u.kernel, u.target): u for u in recorded_usages}
    assert before.keys() == {(u.variant, u.kernel, u.target) for u in usages}
    pairs = [(before[u.variant, u.kernel, u.target], u) for u in usages]
    worse = [
        (old, new)
        for old, new in pairs
        if new.registers > 1.1 * old.registers
        or new.stack > old.stack
        or new.shared > old.shared
        or new.occupancy()[0] < old.occupancy()[0]
    ]
    assert worse == []


@pytest.mark.compile
@pytest.mark.parametrize("target", NVIDIA)
def test_float32_is_never_rounded_to_tf32(usages, target):
    assert [u for u in on(usages, target) if "fp32" in u.variant and u.matrix_unit] == []


@pytest.mark.compile
@pytest.mark.usefixtures("recorded_usages")
def test_the_losses_that_most_people_train_do_not_pay_for_the_others(usages):
    """Registers per thread on sm_90, before the kernels knew more than a clip: within 3 % of that."""
    before = {
        "weigh GRPO on policy": 96,
        "weigh ACE, KL": 114,
    }
    now = {usage.variant: usage.registers for usage in on(usages, "sm_90") if usage.variant in before}
    assert now.keys() == before.keys()
    assert {name: count for name, count in now.items() if count > 1.03 * before[name]} == {}


@pytest.mark.compile
def test_all_have_read_a_block_of_logits_before_any_writes_over_it():
    """The interpreter cannot show a race; what the compiler has made of the barrier can be read."""
    with recorded(TARGETS["sm_90"]) as compiled:
        LAUNCHES["dlogits fp32, fp16 over it"]()
    ((_, kernel),) = compiled
    steps = re.findall(r"\b(ld\.global\.v4|bar\.sync|st\.global\.v4)", kernel.asm["ptx"])
    last_read = len(steps) - 1 - steps[::-1].index("ld.global.v4")
    assert steps[last_read:] == ["ld.global.v4", "bar.sync", "st.global.v4", "st.global.v4"]


@pytest.mark.compile
def test_every_kernel_that_the_library_launches_is_compiled(usages):
    source = "".join(path.read_text() for path in Path(rlvr_kernels.__path__[0]).rglob("*.py"))
    launched = set(re.findall(r"\b(\w+_kernel)\[", source))
    assert {usage.kernel.removesuffix(" 2") for usage in usages} == launched


def test_the_record_has_every_variant_on_every_target():
    rows = load(ROOT / RECORD)[1]
    assert {(u.variant, u.target) for u in rows} == {(variant, target) for variant in LAUNCHES for target in TARGETS}
    assert [u for u in rows if u.stack and u.target in NVIDIA] == []


def test_the_documented_table_is_the_record():
    page = (ROOT / PAGE).read_text()
    assert page == with_table(page, load(ROOT / RECORD)[1]), "python -m tools.compile_table --record writes it"


def test_the_table_names_a_second_kernel_once():
    rows = [Usage(v, k, "sm_90", 4, 32, 0, 2048) for v in ("a", "b") for k in ("main_kernel", "combine_kernel")]
    assert table(rows).splitlines() == [
        "variant  kernel          sm_90",
        "a        main_kernel     32 / 0 / 2 (4) 16rw",
        "a        combine_kernel  32 / 0 / 2 (4) 16rw",
        "b        main_kernel     32 / 0 / 2 (4) 16rw",
    ]


@pytest.mark.parametrize(
    ("target", "num_warps", "registers", "shared", "programs", "limits"),
    [
        ("sm_90", 8, 40, 0, 6, ["registers"]),  # 512 / 40 = 12 warps a scheduler, 48 in all, and 48 / 8
        ("sm_90", 8, 255, 150 << 10, 1, ["registers", "shared memory"]),
        ("sm_90", 4, 128, 113 << 10, 2, ["shared memory"]),  # 2 x (113 + 1) KiB is all there is
        ("sm_90", 4, 128, (113 << 10) + 1, 1, ["shared memory"]),
        ("sm_90", 1, 16, 0, 32, ["programs"]),
        ("sm_80", 8, 32, 0, 8, ["registers", "warps"]),
        ("sm_120", 8, 32, 0, 6, ["warps"]),
        ("gfx942", 8, 128, 32 << 10, 2, ["registers", "shared memory"]),  # 4 waves a SIMD, 16 in all
        ("gfx942", 8, 129, 0, 1, ["registers"]),  # 136 registers: 3 waves a SIMD, 12 in all
    ],
)
def test_occupancy_is_what_the_scarcest_resource_allows(target, num_warps, registers, shared, programs, limits):
    assert occupancy(TARGETS[target], num_warps, registers, shared) == (programs, tuple(limits))


@pytest.mark.interpret
def test_an_interpreted_kernel_cannot_be_compiled():
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET=1"), recorded(TARGETS["sm_90"]):
        pass

from dataclasses import replace

import pytest
from rlvr_kernels.cost import (
    H100_BF16,
    Problem,
    accumulation_bytes,
    cheapest,
    cpu_fp32,
    equal_chunks,
    forward_only,
    moving_pays,
    rows_moved,
    single_pass,
    two_pass,
)

# 2 V H N = 2 * 131072 * 4096 * 8192 = 8.796e12
WIDE = Problem(8192, 4096, 131072, scored=8192, active=8192)
HALF = replace(WIDE, active=4096)
LOGITS = {"logit_bytes": 4, "fused": False}  # a float32 tile that the vendor's product writes, as for float16
GIB = 1 << 30


def cpu(rows: int, active: int | None = None) -> Problem:
    active = rows if active is None else active
    return Problem(rows, 896, 151936, active, active, operand_bytes=4, logit_bytes=4, weight_grad_bytes=4, fused=False)


@pytest.mark.parametrize(
    ("cost", "products"),
    [
        (single_pass(WIDE, H100_BF16, chunk_rows=2048), 3),  # 26.4 TFLOP
        (single_pass(HALF, H100_BF16, chunk_rows=2048), 1 + 2 / 2),
        (two_pass(WIDE, H100_BF16, tile_bytes=GIB), 4),
        (two_pass(HALF, H100_BF16, tile_bytes=GIB), 1 + 3 / 2),
        (two_pass(replace(WIDE, needs_weight=False), H100_BF16, tile_bytes=GIB), 3),
        (forward_only(WIDE, H100_BF16, tile_bytes=GIB), 1),
    ],
    ids=lambda value: getattr(value, "schedule", value),
)
def test_every_product_is_counted_once(cost, products):
    assert cost.flops == pytest.approx(products * 8.796093e12)


@pytest.mark.parametrize(("chunk_rows", "milliseconds"), [(512, 22.2), (1024, 10.7), (2048, 5.0), (4096, 2.15)])
def test_the_weight_gradient_is_written_once_and_then_read_and_written(chunk_rows, milliseconds):
    # 512 rows: 16 chunks, 31 times 131072 * 4096 * 4 = 2.147 GB, 66.6 GB, at 3 TB/s 22.2 ms
    moved = accumulation_bytes(131072 * 4096, 8192 // chunk_rows, 4)
    assert 1e3 * moved / H100_BF16.bytes_per_second == pytest.approx(milliseconds, rel=0.01)
    one, several = (single_pass(WIDE, H100_BF16, chunk_rows=rows) for rows in (8192, chunk_rows))
    # Beyond that: the cast (4 + 2 bytes) for the direct write (2), and the weight (2) read by d_hidden's product a chunk more,
    # and by ours, which reads it for every 1024 rows anyway.
    cast, ours = 4 * 131072 * 4096, max(8192 // chunk_rows - 8, 0)
    read = (8192 // chunk_rows - 1 + ours) * 2 * 131072 * 4096
    assert several.bytes - one.bytes == pytest.approx(moved + cast + read)


def test_hidden_gradients_of_vocabulary_slices_cost_little():
    # 8192 columns: 16 slices, 31 times 8192 * 4096 * 4 = 134 MB, 4.16 GB
    assert 1e3 * accumulation_bytes(8192 * 4096, 16, 4) / 3.0e12 == pytest.approx(1.39, abs=0.01)


def test_the_logits_are_passed_over_as_often_as_the_code_does():
    # One chunk of one row, H = 1, no products: written 4, folded 4, differentiated 4 + 2, read by two products 2 + 2 bytes.
    p = Problem(1, 1, 10**6, scored=1, active=1, **LOGITS)
    weight = 2 + 2 + 2  # read twice, its gradient written
    assert single_pass(p, H100_BF16, chunk_rows=1).bytes == pytest.approx((18 + weight) * 10**6, rel=1e-4)
    # Once more written, and not multiplied; d_hidden is one row in few slices.
    assert two_pass(p, H100_BF16, tile_bytes=GIB).bytes == pytest.approx((22 + weight + 2) * 10**6, rel=1e-4)


def test_exponentials_are_written_once_and_read_by_the_two_products_alone():
    p, weight = Problem(1, 1, 10**6, scored=1, active=1), 2 + 2 + 2
    assert single_pass(p, H100_BF16, chunk_rows=1).bytes == pytest.approx((6 + weight) * 10**6, rel=1e-4)
    # Scoring writes nothing and reads the weight once more.
    assert two_pass(p, H100_BF16, tile_bytes=GIB).bytes == pytest.approx((6 + weight + 2) * 10**6, rel=1e-4)


def test_our_own_products_are_slower_than_the_vendors_and_the_more_so_the_shorter_the_rows():
    shares = [H100_BF16.own_flops(hidden) / H100_BF16.matmul_flops for hidden in (896, 2048, 4096)]
    assert shares == pytest.approx([0.756, 0.847, 0.889], abs=1e-3)
    once = single_pass(WIDE, H100_BF16, chunk_rows=8192)
    plain = single_pass(WIDE, H100_BF16._replace(own_share=1.0, own_tail=0.0), chunk_rows=8192)
    assert once.seconds - plain.seconds == pytest.approx(8.796093e12 / 720e12 * (1 / shares[-1] - 1), rel=1e-3)


def test_the_peak_is_gradients_and_workspace():
    # 151936 * 896 * 4 = 544.5 MB, tile 256 * 151936 * 4 = 155.6 MB, d_hidden 3.7 MB and 0.9 MB of it in a chunk.
    # Measured 713 MB (performance log), 8 MiB more: a block of a twin.
    cost = single_pass(cpu(1024), cpu_fp32(2), chunk_rows=256)
    assert cost.workspace_bytes == 256 * 151936 * 4
    assert cost.peak_bytes == pytest.approx(704.7e6, rel=1e-3)
    # bf16: with several chunks the float32 accumulator lies beside the gradient, 2.1 + 1.1 GB.
    several, one = (single_pass(WIDE, H100_BF16, chunk_rows=rows) for rows in (4096, 8192))
    gradients = (several.peak_bytes - several.workspace_bytes) - (one.peak_bytes - one.workspace_bytes)
    assert gradients == 131072 * 4096 * 4


@pytest.mark.parametrize(("chunks", "seconds"), [(16, 10.1), (8, 7.9), (4, 6.6), (2, 5.4), (1, 5.4)])
def test_the_cpu_model_is_within_a_fifth_of_the_performance_log(chunks, seconds):
    """Its section 2: (512, 896, 151936) on one thread."""
    assert 0.8 * seconds < single_pass(cpu(512), cpu_fp32(1), chunk_rows=512 // chunks).seconds < 1.05 * seconds


@pytest.mark.parametrize(
    ("cost", "seconds"),
    [
        (single_pass(cpu(1024), cpu_fp32(2), chunk_rows=256), 5.7),
        (two_pass(cpu(1024), cpu_fp32(2), tile_bytes=160 << 20), 1.18 * 5.7),
        (single_pass(cpu(1024, 512), cpu_fp32(2), chunk_rows=256), 3.0),
    ],
)
def test_the_cpu_model_gives_the_stored_times(cost, seconds):
    """The performance log's section 1: (1024, 896, 151936) on two threads, and with half of the rows inactive."""
    assert cost.seconds == pytest.approx(seconds, rel=0.05)


def test_one_chunk_is_best():
    times = [single_pass(WIDE, H100_BF16, chunk_rows=rows).seconds for rows in (512, 1024, 2048, 4096, 8192)]
    assert times == sorted(times, reverse=True)


def test_wide_chunks_take_a_single_pass_and_narrow_ones_two():
    assert cheapest(WIDE, 2 * GIB, H100_BF16).schedule == "single_pass"
    assert cheapest(WIDE, 100 << 20, H100_BF16).schedule == "two_pass"
    assert cheapest(cpu(1024), 160 << 20, cpu_fp32(2)).schedule == "single_pass"
    assert cheapest(cpu(1024), 10 << 20, cpu_fp32(2)).schedule == "two_pass"


def test_a_workspace_without_a_whole_row_takes_two_passes():
    row = 2 * 131072
    assert cheapest(WIDE, row - 1, H100_BF16).schedule == "two_pass"
    assert cheapest(replace(WIDE, rows=1, scored=1, active=1), row, H100_BF16).schedule == "single_pass"


def test_rows_are_moved_only_where_that_is_cheaper_than_their_products():
    # H100, bf16: a dropped logit saves 4 * 480 / 720e12 = 2.67 ps; one that is moved costs 4 * 2 / 3e12 = 2.67 ps, and
    # for every dropped row as much of one is moved as rows are kept.
    assert rows_moved(6000, 2000) == 1500
    for kept, hidden in ((4000, 240), (6000, 360), (8000, 480)):
        assert moving_pays(kept, 8000 - kept or 1, hidden + 1, 2, 2, H100_BF16)
        assert not moving_pays(kept, 8000 - kept or 1, hidden - 1, 2, 2, H100_BF16)
        assert not moving_pays(kept, 8000 - kept or 1, 2 * hidden - 1, 2, 1, H100_BF16), (
            "one product: the head is frozen"
        )
    assert not moving_pays(8000, 0, 4096, 2, 2, H100_BF16)
    assert not moving_pays(4000, 4000, 4096, 2, 0, H100_BF16)
    assert moving_pays(0, 8000, 4096, 2, 2, H100_BF16)
    narrow = replace(WIDE, hidden=400, active=8000)  # too narrow: the dropped rows are multiplied
    every = replace(narrow, active=8192)
    assert single_pass(narrow, H100_BF16, chunk_rows=8192).flops == single_pass(every, H100_BF16, chunk_rows=8192).flops


def test_without_gradients_nothing_is_pulled_back():
    cost = cheapest(replace(WIDE, needs_hidden=False, needs_weight=False), GIB, H100_BF16)
    assert cost == forward_only(WIDE, H100_BF16, tile_bytes=GIB)


@pytest.mark.parametrize("workspace_bytes", [6, 1 << 20, 1 << 28, 1 << 31])
@pytest.mark.parametrize("active", [0, 1, 4096, 8192])
def test_the_choice_stays_within_the_workspace(active, workspace_bytes):
    cost = cheapest(replace(WIDE, active=active), workspace_bytes, H100_BF16)
    assert 0 < cost.workspace_bytes <= workspace_bytes
    assert cost == cheapest(replace(WIDE, active=active), workspace_bytes, H100_BF16)


def test_chunks_are_equal_and_as_few_as_possible():
    assert equal_chunks(WIDE, GIB * 3 // 4) == 2731  # 3072 fit: 3 chunks
    assert equal_chunks(WIDE, 16 * GIB) == 8192
    assert equal_chunks(WIDE, 1 << 10) == 0
    assert cheapest(replace(WIDE, scored=0, active=0), GIB, H100_BF16).flops == 0

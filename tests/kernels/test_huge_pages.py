"""Large fresh buffers on a CPU are advised to lie on huge pages; nothing else about them changes."""

import mmap
import sys

import pytest
import torch
from rlvr_kernels import tile

CPU = torch.device("cpu")


class Advised:
    def __init__(self):
        self.calls = []

    def madvise(self, start, length, advice):
        self.calls.append((start.value, length.value, advice))


@pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
def test_advice_covers_whole_pages_of_the_buffer_and_no_byte_outside(monkeypatch):
    advised = Advised()
    monkeypatch.setattr(tile, "_LIBC", advised)
    tensor = tile.empty((3 << 20, 3), torch.float32, CPU)
    ((start, length, advice),) = advised.calls
    assert advice == mmap.MADV_HUGEPAGE
    assert start % mmap.PAGESIZE == 0
    assert 0 <= start - tensor.data_ptr() < mmap.PAGESIZE
    assert start + length == tensor.data_ptr() + tensor.nbytes


def test_small_buffers_and_other_devices_are_left_alone(monkeypatch):
    advised = Advised()
    monkeypatch.setattr(tile, "_LIBC", advised)
    tile.empty((1000,), torch.float32, CPU)
    tile.empty((1 << 24,), torch.float32, torch.device("meta"))
    assert advised.calls == []


@pytest.mark.parametrize("libc", [None, tile._LIBC], ids=["without madvise", "as here"])
def test_the_buffer_is_an_ordinary_tensor(libc, monkeypatch):
    monkeypatch.setattr(tile, "_LIBC", libc)
    tensor = tile.empty((1 << 11, 1 << 11), torch.float32, CPU)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((2048, 2048), torch.float32, "cpu")
    assert tensor.fill_(3.0).sum() == 3 * 2**22

"""Weights from the trainer to a server's workers: a file in shared memory on one machine, a process group across.

The group is Gloo's and goes through main memory: it needs the same of both sides whatever their devices are. It lives for
one transfer, so that a server that was started again is a server like any other.
"""

import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, TCPStore

from rlvr_trainer.sampling.sampler import SamplerError
from rlvr_trainer.sampling.shared_memory import SHARED_MEMORY

SLACK = 2**20  # bytes of a file's header, and then some

Layout = list[tuple[str, list[int], str]]  # name, shape and dtype of every tensor, in the order they are sent


def has_room(weights: Mapping[str, Tensor]) -> bool:
    """Whether the shared memory of this machine holds a copy: a container often has 64 MB of it."""
    needed = sum(value.numel() * value.element_size() for value in weights.values()) + SLACK
    try:
        room = os.statvfs(SHARED_MEMORY)
    except OSError:
        return False
    return room.f_bavail * room.f_frsize > needed


def write(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a safetensors file over the empty one at `path`.

    Raises:
        SamplerError: there is no room for it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    apart, seen = {}, set()
    for name, value in weights.items():
        here = value.cpu().contiguous()
        apart[name] = here.clone() if here.data_ptr() in seen else here  # tied weights: the format knows none
        seen.add(here.data_ptr())
    try:
        save_file(apart, path)
    except (OSError, SafetensorError) as error:
        raise SamplerError(f"weights: {SHARED_MEMORY} cannot be written: {error}") from error


def layout_of(weights: Mapping[str, Tensor]) -> Layout:
    """What `receive` has to know before anything is sent."""
    return [(name, list(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in weights.items()]


@contextmanager
def sending(weights: Mapping[str, Tensor], receivers: int, address: str, patience: float) -> Iterator[int]:
    """Broadcast tensor by tensor, meanwhile, to those that `receive`; gives the port to join at.

    `address` is this machine's, as they see it. The end waits for all to be sent, but not if something has failed.

    Raises:
        SamplerError: it could not be sent.
    """
    store = _store_at(address, patience)
    failed: list[Exception] = []

    def send() -> None:
        try:
            group = _join(store, 0, 1 + receivers, address, patience)
            for value in weights.values():
                group.broadcast(_bytes_of(value.cpu().contiguous()), 0).wait()
        except Exception as error:
            failed.append(error)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    yield store.port
    sender.join()
    if failed:
        raise SamplerError(f"weights could not be sent from {address}: {failed[0]}") from failed[0]


def receive(address: str, port: int, size: int, layout: Layout, patience: float) -> Iterator[tuple[str, Tensor]]:
    """Join the sender at `address` and give what it sends, by name. Of `size` members one sends."""
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=patience))
    group = _join(store, store.add("joined", 1), size, address_towards(address, port), patience)
    for name, shape, dtype in layout:
        value = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
        group.broadcast(_bytes_of(value), 0).wait()
        yield name, value


def address_towards(host: str, port: int) -> str:
    """The address of this machine that `host` sees. A name may resolve to the loopback; a route does not."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing
        found: str = probe.getsockname()[0]
        return found


def _store_at(address: str, patience: float) -> TCPStore:
    """One that listens at this address alone; by itself it would at all that there are."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, 0), family=family)
    return TCPStore(
        address,
        listening.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=patience),
        master_listen_fd=listening.detach(),
    )


def _join(store: TCPStore, rank: int, size: int, address: str, patience: float) -> Any:
    gloo: Any = ProcessGroupGloo  # whose options have no types
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=patience)
    return gloo(store, rank, size, options)


def _bytes_of(value: Tensor) -> Tensor:
    return value.view(-1).view(torch.uint8)

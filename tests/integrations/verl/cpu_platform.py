"""A CPU as a platform of verl, which knows accelerators only. verl imports it by VERL_USE_EXTERNAL_MODULES."""

import types
from contextlib import contextmanager

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def nothing(*_args, **_kwargs):
    return None


def zero(*_args, **_kwargs):
    return 0


memory = {f"{peak}memory_{kind}": zero for peak in ("", "max_") for kind in ("allocated", "reserved")}
device_module = types.SimpleNamespace(
    **{name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("__")}
    | memory
    | dict.fromkeys(("empty_cache", "set_device", "ipc_collect", "reset_peak_memory_stats"), nothing)
    | {
        "mem_get_info": lambda *_: (0, 1),
        "get_rng_state": torch.get_rng_state,
        "set_rng_state": torch.set_rng_state,
        "manual_seed": torch.manual_seed,
        "get_device_name": lambda *_: "CPU",
        "current_device": lambda: "cpu",
        "device_count": lambda: 1,
        "is_available": lambda: False,
    }
)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = device_module
    current_device = staticmethod(lambda: "cpu")
    device_count = staticmethod(lambda: 1)
    get_device_capability = staticmethod(lambda _=0: (None, None))
    communication_backend_name = staticmethod(lambda: "gloo")
    visible_devices_envvar = staticmethod(lambda: "CUDA_VISIBLE_DEVICES")
    ray_resource_name = staticmethod(lambda: "CPU")
    ray_noset_envvars = staticmethod(list)
    ray_resource_options = staticmethod(lambda n: {"num_cpus": n})
    is_available = staticmethod(lambda: True)
    is_ipc_supported = staticmethod(lambda: False)
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    set_device = synchronize = set_allocator_settings = empty_cache = staticmethod(nothing)
    profiler_start = profiler_stop = cudart = staticmethod(nothing)

    @contextmanager
    def nvtx_range(self, _message):
        yield

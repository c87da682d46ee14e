"""The GPU architectures that the kernels are compiled for, and how many programs one processor of each can hold."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """An architecture: Triton's name for it, and the resources of one processor (multiprocessor, compute unit).

    Registers (of one lane) and warps are counted per scheduler, because a warp lives on one of them. In bytes of shared
    memory, shared_limit is what one program may use, shared what a processor has, and reserved what each program adds.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    shared: int
    warps: int
    programs: int
    registers: int = 512
    schedulers: int = 4
    register_granule: int = 8
    reserved: int = 1024
    shared_granule: int = 128


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Registers are given to a warp in
# units of 256, 8 a thread, and 1 KiB of shared memory per program belongs to the system (CUDA Occupancy Calculator).
# AMD: LLVM's AMDGPU target (AMDGPUBaseInfo: 512 registers in units of 8, 8 wavefronts, 16 workgroups for their barriers).
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10, shared=164 << 10, warps=16, programs=32),
    "sm_90": Target("cuda", 90, 32, 227 << 10, shared=228 << 10, warps=16, programs=32),
    "sm_100": Target("cuda", 100, 32, 227 << 10, shared=228 << 10, warps=16, programs=32),
    "sm_120": Target("cuda", 120, 32, 99 << 10, shared=100 << 10, warps=12, programs=24),
    "gfx942": Target(
        "hip", "gfx942", 64, 64 << 10, shared=64 << 10, warps=8, programs=16, reserved=0, shared_granule=512
    ),
}
LIMITS = {"registers": "r", "shared memory": "s", "warps": "w", "programs": "p"}


def occupancy(target: Target, num_warps: int, registers: int, shared: int) -> tuple[int, tuple[str, ...]]:
    """(programs that one processor can hold at a time, the resources in LIMITS that limit them).

    An estimate from the compiled registers per thread and bytes of shared memory per program, with a program's warps spread
    evenly over the schedulers.
    """
    per_warp = max(registers, 1) + -max(registers, 1) % target.register_granule
    per_program = shared + target.reserved
    per_program += -per_program % target.shared_granule
    room = {
        "registers": target.registers // per_warp * target.schedulers // num_warps,
        "shared memory": target.shared // per_program if per_program else target.programs,
        "warps": target.warps * target.schedulers // num_warps,
        "programs": target.programs,
    }
    programs = min(room.values())
    return programs, tuple(name for name, count in room.items() if count == programs)

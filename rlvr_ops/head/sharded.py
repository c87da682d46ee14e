"""whole: a parameter that FSDP2 or tensor parallelism has sharded, in full."""

from typing import Any

from torch import Tensor


def whole(parameter: Tensor) -> Tensor:
    """The parameter, or all of a DTensor. Its gradient is averaged over the ranks, each of which has a part of the batch.

    Inside the forward of an FSDP2 module the module's own parameters are whole already. This is for a head that was sharded
    as a module of its own and whose forward is not called.

    Raises:
        ValueError: a mesh of more than one dimension.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    sharded: Any = parameter
    if sharded.device_mesh.ndim != 1:
        raise ValueError(f"lm_head must be sharded over one dimension of a mesh, got {sharded.device_mesh.ndim}")
    full: Tensor = sharded.full_tensor(grad_placements=[Partial()])
    if full.requires_grad:
        ranks = sharded.device_mesh.size()
        full.register_hook(lambda gradient: gradient / ranks)
    return full

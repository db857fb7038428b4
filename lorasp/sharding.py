"""Tensors of which every process holds a part (DTensor, as torch's fully_shard makes them), and the processes.

Reading such a tensor whole is a collective: every process that holds a part must take part. Giving it values is not:
every process has the whole values and keeps its own part of them.
"""

import errno
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")
_KINDS = {kind.__name__: kind for kind in (ValueError, TypeError)}


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other, itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, on every process (a collective; gradients flow); any other, itself."""
    if not is_sharded(tensor):
        return tensor
    # Offloaded parts are gathered where the mesh's processes can talk.
    kind = tensor.device_mesh.device_type
    return (tensor if tensor.device.type == kind else tensor.to(kind)).full_tensor()


def placed(value: Tensor, like: Tensor) -> Tensor:
    """The whole `value`, broadcastable to the sharded `like`, sharded as that is; replicated where it is broadcast."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = [
        Replicate() if placement.is_shard() and value.shape[placement.dim] != like.shape[placement.dim] else placement
        for placement in like.placements
    ]
    return distribute_tensor(value, like.device_mesh, placements, src_data_rank=None)


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    """Copy the whole `value` into `tensor`, in place; into a sharded one, this process's part of it."""
    if is_sharded(tensor) and not is_sharded(value):
        value = placed(value.to(tensor.device, tensor.dtype), tensor)
    tensor.copy_(value)


def own_class(module: nn.Module) -> type:
    """The class of `module` before fully_shard derived another one from it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    cls = type(module)
    return cls.__mro__[2] if fsdp is not None and cls.__bases__[0] is fsdp.FSDPModule else cls


def is_managed(module: nn.Module) -> bool:
    """Whether fully_shard gathers the parameters of `module` and frees them again; known from the first forward on."""
    # While gathered they look like any other: the hooks that shard them again before a state_dict give it away.
    hooks = module._state_dict_pre_hooks.values()
    return any(getattr(hook, "__module__", "").startswith("torch.distributed.fsdp") for hook in hooks)


class Processes:
    """The processes that hold the parts of one model, as far as they must act together; alone without groups."""

    def __init__(self, groups: list):
        self.groups = groups

    @classmethod
    def of(cls, model: nn.Module, where: str) -> "Processes":
        """Those among which `model` is sharded; gathered parameters are given back first.

        Raises ValueError for FullyShardedDataParallel, which flattens what it shards.
        """
        fsdp = sys.modules.get("torch.distributed.fsdp")
        modules = [] if fsdp is None else list(model.modules())
        if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in modules):
            raise ValueError(f"{where}: model must be sharded by fully_shard (FSDP2), got FullyShardedDataParallel")
        for module in modules:
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()
        meshes = {parameter.device_mesh for parameter in model.parameters() if is_sharded(parameter)}
        return cls(max(meshes, key=lambda mesh: mesh.size()).get_all_groups() if meshes else [])

    @property
    def first(self) -> bool:
        """Whether this process is the one to act for all."""
        return all(torch.distributed.get_rank(group) == 0 for group in self.groups)

    def exchange(self, value: Result) -> list[Result]:
        """The values of all processes, in the same order on all of them."""
        values = [value]
        for group in self.groups:
            parts = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(parts, values, group=group)
            values = [value for part in parts for value in part]
        return values

    def run(self, act: Callable[[], Result]) -> Result:
        """act() on every process; an error on one of them is raised on all."""
        if not self.groups:
            return act()
        result = error = failure = None
        try:
            result = act()
        except Exception as caught:
            error, failure = caught, _failure(caught)
        failures = [failure for failure in self.exchange(failure) if failure is not None]
        if error is not None:
            raise error
        if failures:
            kind, number, text = failures[0]
            raise OSError(number, text) if number is not None else _KINDS.get(kind, RuntimeError)(text)
        return result


def _failure(error: Exception) -> tuple[str, int | None, str]:
    """What the other processes are told: kind, errno of an OSError, text."""
    rank = torch.distributed.get_rank()
    if isinstance(error, OSError):
        return "OSError", error.errno or errno.EIO, f"{error.strerror or error} (on rank {rank})"
    return type(error).__name__, None, f"{error} (on rank {rank})"

"""Whether the processes of one training hold the same adapters."""

import ctypes
import hashlib
import json

import torch
from torch import Tensor, nn

from lorasp.adapter.adapter import Adapter
from lorasp.models.adapted import unwrap
from lorasp.sharding import Processes, is_sharded


def check_processes(model: nn.Module, group: "torch.distributed.ProcessGroup | None" = None) -> None:
    """Raise ValueError, on every process alike, unless all of them hold the same adapters in `model`.

    Compared are configs, the adapters' ranks, scales and settings, names, shapes and dtypes of what trains, LoRA-SP's
    selections and the bits of all these tensors that a process holds whole (a frozen A stays so under fully_shard).

    Every process must call it: those that `model` is sharded among, else those of `group` (default: of the model's
    DistributedDataParallel, or all). Without torch.distributed there is nothing to compare. Call it before fully_shard,
    which takes each process's part as it is; DistributedDataParallel hangs on shapes that differ and overwrites values
    by those of rank 0. Equal seeds before inject(), or one file for load_adapter(), make adapters equal.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return
    if group is None and isinstance(model, nn.parallel.DistributedDataParallel):
        group = model.process_group
    model = unwrap(model)
    processes = Processes.of(model, "check_processes")
    if not processes.groups:
        processes = Processes([group or distributed.group.WORLD])
    agree(processes, "check_processes", description(model, values=True))


def description(model: nn.Module, *, values: bool) -> dict[str, str]:
    """Adapters, their tensors, all else that trains, configs, by name; with values, digests of what is held whole."""
    found, own = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            found[name] = repr(module)
            for key, tensor in (*module.named_parameters(name), *module.named_buffers(name)):
                found[key] = _words(tensor, values)
                own.add(tensor)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in own:
            found[name] = _words(parameter, values)
    for name, config in getattr(model, "lorasp_configs", {}).items():
        found |= {f"config {name!r}, {field}": repr(value) for field, value in vars(config).items()}
    return found


def agree(processes: Processes, where: str, mine: dict[str, str]) -> None:
    """Raise ValueError on every process unless `mine` is the same on all of them."""
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    if len(set(processes.exchange(digest))) == 1:
        return
    (first, expected), *others = processes.exchange((torch.distributed.get_rank(), mine))
    rank, found = next((rank, found) for rank, found in others if found != expected)
    names = [name for name in (*expected, *found) if expected.get(name) != found.get(name)]
    names = list(dict.fromkeys(names))
    shown = "; ".join(
        f"{name}: {expected.get(name, 'nothing')} on rank {first}, {found.get(name, 'nothing')} on rank {rank}"
        for name in names[:4]
    )
    more = f"; and {len(names) - 4} more" if len(names) > 4 else ""
    raise ValueError(f"{where}: processes must hold the same adapters, got {shown}{more}")


def _words(tensor: Tensor, values: bool) -> str:
    words = f"{tuple(tensor.shape)} {tensor.dtype}{' frozen' * (not tensor.requires_grad)}"
    if not values or is_sharded(tensor) or tensor.is_meta:
        return words
    return f"{words} with values {tensor_digest(tensor)}"


def tensor_digest(tensor: Tensor) -> str:
    """16 hexadecimal digits of sha256 over the tensor's bytes."""
    tensor = tensor.detach().cpu().contiguous()
    data = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else b""
    return hashlib.sha256(data).hexdigest()[:16]

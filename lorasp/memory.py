"""Bytes autograd keeps for backward: the figure the memory contract is stated in."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def saved_bytes(fn: Callable[[], object], exclude: nn.Module | Tensor | Iterable[nn.Module | Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd saves for backward while `fn` runs.

    exclude: modules (their parameters and buffers) and tensors whose storages do not count. A storage counts once and
    whole, however many views of it are saved: three layers that save the same x save it once. Only what goes through
    saved-tensor hooks is seen, which is all that save_for_backward keeps. `fn` runs once; nothing is kept alive after.
    """
    exclude = (exclude,) if isinstance(exclude, nn.Module | Tensor) else tuple(exclude)
    tensors = [
        tensor
        for item in exclude
        for tensor in ((*item.parameters(), *item.buffers()) if isinstance(item, nn.Module) else (item,))
    ]
    excluded = {tensor.untyped_storage()._cdata for tensor in tensors}
    # Holding the storages keeps the allocator from giving one address to two of them while fn runs.
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in excluded:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn()
    return sum(storage.nbytes() for storage in saved.values())

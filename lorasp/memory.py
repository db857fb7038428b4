"""Bytes autograd keeps for backward: the figure the memory contract is stated in."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn


def saved_bytes(fn: Callable[[], object], exclude: nn.Module | Tensor | Iterable[nn.Module | Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd saves for backward while `fn` runs.

    exclude: modules (their parameters, buffers, prepacked and quantised weights) and tensors whose storages do not
    count. A storage counts once and whole, however many views of it are saved: three layers that save the same x save
    it once.
    Only what goes through saved-tensor hooks is seen, which is all that save_for_backward keeps. `fn` runs once;
    nothing is kept alive after.
    """
    # Holding the storages keeps the allocator from giving one address to two of them while fn runs.
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn()
    exclude = (exclude,) if isinstance(exclude, nn.Module | Tensor) else exclude
    for item in exclude:
        for tensor in _standing(item) if isinstance(item, nn.Module) else (item,):
            saved.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in saved.values())


def _standing(module: nn.Module) -> Iterator[Tensor]:
    """The tensors a module holds between steps."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        yield from getattr(part, "packed", None) or ()
        yield from getattr(part, "frozen_tensors", None) or ()

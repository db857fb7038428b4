"""What adapters train in full, biases and modules_to_save: of several values per place, the one in force stands there.

A model stays the modules it was: no wrapper, no other names. Who is not in force waits here, outside the state_dict.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lorasp.sharding import is_sharded

# Whose values a place has where no adapter trains it; no adapter can be called so.
BASE = ""


class WholeTensors:
    """Parameters and buffers by name, for each adapter that has its own, and for the model without adapters.

    The Parameters an adapter trains stay the same objects wherever they wait, so an optimizer goes on with them; tied
    ones stay tied. Values that waited while the model moved are brought to its device and dtype when they come back.
    """

    def __init__(self):
        self._in_force: dict[str, str] = {}
        self._waiting: dict[str, dict[str, Tensor]] = {BASE: {}}

    def add(self, model: nn.Module, adapter: str, keys: Iterable[str], *, active: bool) -> None:
        """Let `adapter` have these tensors, from what the model is without adapters.

        active: it takes what stands in the model, which begins to train, and a copy of it waits; otherwise the copy is
        the adapter's.
        """
        own = self._waiting[adapter] = {}
        copies: dict[Tensor, Tensor] = {}
        for key in keys:
            here = _place(model, key)[2]
            base = here if self._in_force.setdefault(key, BASE) == BASE else self._waiting[BASE][key]
            if base not in copies:
                copies[base] = _copy(base)
            if active:
                self._waiting[BASE][key], self._in_force[key] = copies[base], adapter
                _train(here, True)
            else:
                own[key] = copies[base]

    def switch(self, model: nn.Module, adapter: str) -> None:
        """Put an adapter's tensors in force, the base's where it has none. Nobody's requires_grad changes.

        Raises ValueError, with nothing changed, where one to be replaced is sharded: what waits is whole.
        """
        wanted = {key: adapter if self.has(adapter, key) else BASE for key in self._in_force}
        changes = {key: new for key, new in wanted.items() if new != self._in_force[key]}
        if sharded := [key for key in changes if is_sharded(_place(model, key)[2])]:
            raise ValueError(
                "lorasp: biases and modules_to_save must be whole where adapters change, "
                f"not in a sharded model: {sharded[0]}"
            )
        for key, new in changes.items():
            module, leaf, here = _place(model, key)
            there = self._waiting[new].pop(key)
            if there.device != here.device or there.dtype != here.dtype:
                there.data = there.data.to(here.device, here.dtype)
            self._waiting[self._in_force[key]][key] = here
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = there
            self._in_force[key] = new

    def train(self, model: nn.Module) -> None:
        """Let what adapters have in force require grad, and nothing that waits."""
        for waiting in self._waiting.values():
            for tensor in waiting.values():
                _train(tensor, False)
        for key, owner in self._in_force.items():
            if owner != BASE:
                _train(_place(model, key)[2], True)

    def remove(self, adapter: str) -> None:
        """Forget an adapter whose tensors are not in force."""
        self._waiting.pop(adapter, None)

    def __contains__(self, key: str) -> bool:
        """Whether any adapter has this tensor in full."""
        return key in self._in_force

    def has(self, adapter: str, key: str) -> bool:
        return key in self._waiting.get(adapter, ()) or self._in_force.get(key) == adapter

    def value(self, model: nn.Module, adapter: str, key: str) -> Tensor:
        """An adapter's tensor, in force or waiting."""
        waiting = self._waiting.get(adapter, {})
        return waiting[key] if key in waiting else _place(model, key)[2]


def _place(model: nn.Module, key: str) -> tuple[nn.Module, str, Tensor]:
    owner, _, leaf = key.rpartition(".")
    module = model.get_submodule(owner)
    return module, leaf, module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _train(tensor: Tensor, trains: bool) -> None:
    if isinstance(tensor, nn.Parameter) and torch.is_floating_point(tensor):
        tensor.requires_grad_(trains)

"""What adapters train in full, biases and modules_to_save: of several values per place, the one in force stands there.

A model's own modules stay as they are. Who is not in force waits in a child of the model, so that the state_dict, moves
and copies hold all of it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lorasp.sharding import is_sharded

# Whose values a place has where no adapter trains it; no adapter can be called so.
BASE = ""
CHILD = "lorasp_whole"


class WholeTensors(nn.Module):
    """Parameters and buffers by their names in the model, for each adapter that has its own, and for the base.

    The Parameters an adapter trains stay the same objects wherever they wait, so an optimizer goes on with them; tied
    ones, and those of a module that stands under several names, stay tied. In the state_dict what waits is
    lorasp_whole.base.<name> and lorasp_whole.own.<adapter>.<name>, with "/" for the dots of the name: it loads
    into a model whose active adapter is the same.
    """

    def __init__(self):
        super().__init__()
        self.base, self.own = nn.Module(), nn.ModuleDict()
        self._in_force: dict[str, str] = {}
        self._names: dict[str, str] = {}  # what a place is called elsewhere -> here

    def forward(self, x):
        # An nn.Sequential that holds it calls it as the last of its children.
        return x

    def add(self, model: nn.Module, adapter: str, keys: Iterable[str], *, active: bool) -> None:
        """Let `adapter` have these tensors, and those tied to them, from what the model is without adapters.

        active: it takes what stands in the model, which begins to train, and a copy of it waits; otherwise the copy is
        the adapter's.
        """
        own = self.own[adapter] = nn.Module()
        copies: dict[Tensor, Tensor] = {}
        places = _places(model, keys)
        self._names |= {key: places[_spot(model, key)] for key in keys}
        for key in places.values():
            here = _place(model, key)[2]
            base = here if self._in_force.setdefault(key, BASE) == BASE else _held(self.base)[_flat(key)]
            if base not in copies:
                copies[base] = _copy(base)
            _hold(self.base if active else own, key, copies[base])
            if active:
                self._in_force[key] = adapter
                _train(here, True)

    def switch(self, model: nn.Module, adapter: str, where: str) -> None:
        """Put an adapter's tensors in force, the base's where it has none. Nobody's requires_grad changes.

        Raises ValueError, naming `where` and with nothing changed, where one to be replaced is sharded (what waits is
        whole) or holds no data.
        """
        changes = {}
        for key, owner in self._in_force.items():
            new = adapter if self.has(adapter, key) else BASE
            if new != owner:
                changes[key] = owner, new, *_place(model, key), _held(self._waiting(new))[_flat(key)]
        for key, (*_, here, there) in changes.items():
            if is_sharded(here):
                raise ValueError(
                    f"{where}: biases and modules_to_save must be whole where adapters change, {key} is sharded"
                )
            if here.is_meta != there.is_meta:
                raise ValueError(f"{where}: biases and modules_to_save must be on a real device, {key} is not")
        for key, (owner, new, module, leaf, here, there) in changes.items():
            if there.device != here.device or there.dtype != here.dtype:
                there.data = there.data.to(here.device, here.dtype)
            _held(self._waiting(new), pop=_flat(key))
            _hold(self._waiting(owner), key, here)
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = there
            self._in_force[key] = new

    def train_in_force(self, model: nn.Module) -> None:
        """Let what adapters have in force require grad, and nothing that waits."""
        self.requires_grad_(False)
        for key, owner in self._in_force.items():
            if owner != BASE:
                _train(_place(model, key)[2], True)

    def remove(self, adapter: str) -> None:
        """Forget an adapter whose tensors are not in force."""
        if adapter in self.own:
            del self.own[adapter]
        for key in [key for key in self._in_force if not any(self.has(other, key) for other in self.own)]:
            del self._in_force[key]

    def rename(self, old: str, new: str) -> None:
        """The module `old` stands under the name `new` from now on."""
        for key in [key for key in self._in_force if key.startswith(f"{old}.")]:
            renamed = f"{new}.{key.removeprefix(f'{old}.')}"
            self._in_force[renamed] = self._in_force.pop(key)
            self._names |= {name: renamed for name, here in self._names.items() if here == key}
            for holder in (self.base, *self.own.values()):
                if _flat(key) in _held(holder):
                    _hold(holder, renamed, _held(holder, pop=_flat(key)))

    def __contains__(self, key: str) -> bool:
        """Whether any adapter has this tensor in full."""
        return self._names.get(key, key) in self._in_force

    def has(self, adapter: str, key: str) -> bool:
        waits = adapter in self.own and _flat(key) in _held(self.own[adapter])
        return waits or self._in_force.get(key) == adapter

    def value(self, model: nn.Module, adapter: str, key: str) -> Tensor:
        """An adapter's tensor, in force or waiting."""
        waiting = _held(self.own[adapter]) if adapter in self.own else {}
        name = _flat(self._names.get(key, key))
        return waiting[name] if name in waiting else _place(model, key)[2]

    def _waiting(self, owner: str) -> nn.Module:
        return self.base if owner == BASE else self.own[owner]


def whole_tensors(model: nn.Module) -> WholeTensors:
    """Those of the model; where no adapter trains anything in full, none."""
    return getattr(model, CHILD, None) or WholeTensors()


def _flat(key: str) -> str:
    return key.replace(".", "/")


def _held(holder: nn.Module, pop: str | None = None):
    """The tensors of a holder by name; with pop, the one of that name, taken out."""
    if pop is None:
        return {**holder._parameters, **holder._buffers}
    return (holder._parameters if pop in holder._parameters else holder._buffers).pop(pop)


def _hold(holder: nn.Module, key: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        holder.register_parameter(_flat(key), tensor)
    else:
        holder.register_buffer(_flat(key), tensor)


def _place(model: nn.Module, key: str) -> tuple[nn.Module, str, Tensor]:
    owner, _, leaf = key.rpartition(".")
    module = model.get_submodule(owner)
    return module, leaf, module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]


def _spot(model: nn.Module, key: str) -> tuple[int, str]:
    module, leaf, _ = _place(model, key)
    return id(module), leaf


def _places(model: nn.Module, keys: Iterable[str]) -> dict[tuple[int, str], str]:
    """One name for each place (a module may stand under several), of these tensors and of those tied to them."""
    tensors = {_place(model, key)[2] for key in keys}
    places: dict[tuple[int, str], str] = {}
    for name, module in model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor in tensors and not name.startswith(CHILD):
                places.setdefault((id(module), leaf), f"{name}.{leaf}" if name else leaf)
    return places


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _train(tensor: Tensor, trains: bool) -> None:
    if isinstance(tensor, nn.Parameter) and torch.is_floating_point(tensor):
        tensor.requires_grad_(trains)

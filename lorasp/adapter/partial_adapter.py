"""Adapters of which a part trains (LoRA-SP; partial.py says what the paper fixes and what is our reading).

A choice that stays (resample="never") keeps what trains in packed Parameters, so that any optimizer, gradient clip or
DDP bucket sees only that. A choice that changes keeps dense Parameters, which lorasp.optim.PartialAdamW must train.
"""

import weakref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lorasp.adapter import selection
from lorasp.adapter.adapter import Adapter
from lorasp.adapter.selection import Selection, Site
from lorasp.config import PartialConfig
from lorasp.sharding import assign, full, is_sharded


class PartialAdapter(Adapter):
    """An adapter with a selection: bool buffers active_A, active_B (shapes: selection.py), in the state_dict.

    The index buffers the operators take follow from them and are not in the state_dict.
    """

    # active_A of granularity "feature" as the host knows it: layers compare theirs without waiting for the device.
    columns_key: bytes | None = None

    def __init__(self, partial: PartialConfig, site: Site, **arguments):
        self._partial_and_site = partial, site
        super().__init__(site.in_features, site.out_features, **arguments)

    @property
    def partial(self) -> PartialConfig:
        return self._partial_and_site[0]

    @property
    def site(self) -> Site:
        return self._partial_and_site[1]

    def choose(self, chosen: Selection) -> None:
        """Take over a selection; the effective A and B do not change."""
        raise NotImplementedError

    def misfit(self, chosen: Selection) -> str:
        """Why choose() cannot take this selection of the right shape; empty if it can."""
        return ""

    def share(self, shared: str) -> None:
        """Draw the columns of A under the name `shared`, as every layer on the same input must."""
        self._partial_and_site = self.partial, self.site._replace(shared=shared)
        if self.partial.granularity == "feature" and not self.freeze_A:
            self.choose(selection.draw(self.partial, self.site, self.drawn()))

    def select(self, score_A: Tensor | None, score_B: Tensor) -> None:
        """Take the entries with the highest scores instead of random ones."""
        self.choose(selection.by_scores(self.partial, self.site, score_A, score_B))

    def drawn(self) -> int:
        """How many times the selection has been drawn anew."""
        return 0

    def selection(self) -> Selection:
        return Selection(self._buffers.get("active_A"), self.active_B)

    def trainable_mask_A(self) -> Tensor:
        shape = (self.r, self.in_features)
        if self.freeze_A:
            return torch.zeros(shape, dtype=torch.bool, device=self.active_B.device)
        return self.active_A.expand(shape).clone()

    def trainable_mask_B(self) -> Tensor:
        return self.active_B.expand(self.out_features, self.r).clone()

    def _hold_masks(self, chosen: Selection, device: torch.device) -> None:
        if chosen.active_A is not None:
            self.register_buffer("active_A", chosen.active_A.to(device))
        self.register_buffer("active_B", chosen.active_B.to(device))

    def _note_columns(self, chosen: Selection) -> None:
        if self.partial.granularity == "feature" and chosen.active_A is not None and not chosen.active_A.is_meta:
            self.columns_key = bytes(chosen.active_A.flatten().tolist())

    def _indices(self, chosen: Selection) -> dict[str, Tensor]:
        """Sorted int64 indices by the name of the operators' argument: A's columns, B's rows, or flat entries."""
        names, dense = ("columns", "rows"), False
        if self.partial.granularity != "feature":
            names, dense = ("entries_A", "entries_B"), True
        shapes = (self.r, self.in_features), (self.out_features, self.r)
        return {
            name: (active.expand(shape) if dense else active).flatten().nonzero().flatten()
            for name, active, shape in zip(names, chosen, shapes, strict=True)
            if active is not None
        }

    def extra_repr(self) -> str:
        p = self.partial
        words = [super().extra_repr(), f"trainable_ratio={p.trainable_ratio}", f"granularity={p.granularity!r}"]
        return ", ".join(words + [f"resample={p.resample!r}"] * (p.resample != "never"))


class PackedAdapter(PartialAdapter):
    """A selection that stays: Parameters lora_A_packed, lora_B_packed hold what trains, buffers the rest.

    feature: (r, |J|) and (|I|, r); element and rank: (n,). frozen_A (r, in) has zeros where A trains (freeze_A: lora_A
    (r, in) is frozen whole). frozen_B (out, r) exists only while a frozen entry of B is not zero.
    """

    def _create(self, device: torch.device, dtype: torch.dtype) -> None:
        chosen = selection.draw(self.partial, self.site)
        self._hold_masks(chosen, device)
        for name, index in self._indices(chosen).items():
            self.register_buffer(name, index.to(device), persistent=False)
        if self.freeze_A:
            self.register_buffer("lora_A", torch.empty((self.r, self.in_features), device=device, dtype=dtype))
        else:
            self.register_buffer("frozen_A", torch.empty((self.r, self.in_features), device=device, dtype=dtype))
            self.lora_A_packed = nn.Parameter(torch.empty(self._packed_shape("A"), device=device, dtype=dtype))
        self.register_buffer("frozen_B", None)
        self.lora_B_packed = nn.Parameter(torch.empty(self._packed_shape("B"), device=device, dtype=dtype))

    def _packed_shape(self, factor: str) -> tuple[int, ...]:
        if self.partial.granularity != "feature":
            return tuple(getattr(self, f"entries_{factor}").shape)
        return (self.r, self.columns.shape[0]) if factor == "A" else (self.rows.shape[0], self.r)

    def reset_parameters(self) -> None:
        """Draw A, and B or zeros, as init_lora_weights says, and the selection as its seed says."""
        made = {"device": self.lora_B_packed.device, "dtype": self.lora_B_packed.dtype}
        lora_A = torch.empty((self.r, self.in_features), **made)
        lora_B = torch.empty((self.out_features, self.r), **made)
        self._fill(lora_A, lora_B)
        self._take(selection.draw(self.partial, self.site), lora_A, lora_B)

    def set_dense(self, lora_A: Tensor, lora_B: Tensor) -> None:
        self._take(None, lora_A, lora_B)

    def misfit(self, chosen: Selection) -> str:
        if not is_sharded(self.lora_B_packed):
            return ""
        wrong = []
        for name, index in self._indices(chosen).items():
            packed = self._parameters["lora_A_packed" if name in ("columns", "entries_A") else "lora_B_packed"]
            if len(index) != (size := packed.shape[name == "columns"]):
                wrong.append(f"{len(index)} {name} where the sharded parameter holds {size}")
        return ", ".join(wrong)

    def choose(self, chosen: Selection) -> None:
        with torch.no_grad():
            self._take(chosen, self.dense_A().clone(), self.dense_B().clone())

    @torch.no_grad()
    def _take(self, chosen: Selection | None, lora_A: Tensor, lora_B: Tensor) -> None:
        """Split dense factors into the packed Parameters, which stay the same objects, and the buffers."""
        like = self.lora_B_packed
        if chosen is not None:
            for name, value in (*zip(Selection._fields, chosen, strict=True), *self._indices(chosen).items()):
                if value is not None:
                    setattr(self, name, value.to(like.device))
            self._note_columns(chosen)
        lora_A, lora_B = lora_A.to(like.device, like.dtype), lora_B.to(like.device, like.dtype)
        if self.freeze_A:
            self.lora_A.copy_(lora_A)
        else:
            trains = self.active_A.expand(lora_A.shape)
            self.frozen_A = lora_A.masked_fill(trains, 0)
            self._put("lora_A_packed", self._gather("A", lora_A))
        frozen_B = lora_B.masked_fill(self.active_B.expand(lora_B.shape), 0)
        self.frozen_B = frozen_B if not like.is_meta and frozen_B.any() else None
        self._put("lora_B_packed", self._gather("B", lora_B))

    def _gather(self, factor: str, dense: Tensor) -> Tensor:
        if self.partial.granularity != "feature":
            return dense.flatten().index_select(0, getattr(self, f"entries_{factor}"))
        return dense.index_select(1, self.columns) if factor == "A" else dense.index_select(0, self.rows)

    def _put(self, name: str, value: Tensor) -> None:
        parameter = self._parameters[name]
        if parameter.shape == value.shape:
            assign(parameter, value)
        else:
            parameter.data, parameter.grad = value, None

    def dense_A(self) -> Tensor:
        if self.freeze_A:
            return self.lora_A
        # The packed Parameters alone may have been cast: `p.data = p.data.float()` over what trains.
        packed = full(self.lora_A_packed)
        frozen_A = self.frozen_A.to(packed.dtype)
        if self.partial.granularity == "feature":
            return frozen_A.index_copy(1, self.columns, packed)
        return frozen_A.flatten().index_copy(0, self.entries_A, packed).view_as(frozen_A)

    def dense_B(self) -> Tensor:
        packed, shape = full(self.lora_B_packed), (self.out_features, self.r)
        frozen_B = packed.new_zeros(shape) if self.frozen_B is None else self.frozen_B.to(packed.dtype)
        if self.partial.granularity == "feature":
            return frozen_B.index_copy(0, self.rows, packed)
        return frozen_B.flatten().index_copy(0, self.entries_B, packed).view_as(frozen_B)

    def parts(self) -> dict[str, Tensor]:
        feature = self.partial.granularity == "feature"
        names = ("columns", "rows") if feature else ("entries_A", "entries_B")
        parts, index = {"lora_B": self.lora_B_packed}, getattr(self, names[1])
        # All columns, or rows, are a whole factor: nothing to gather, and no copy of x to keep.
        if not feature or index.shape[0] < self.out_features:
            parts |= {"frozen_B": self.frozen_B, names[1]: index}
        if self.freeze_A:
            return parts | {"lora_A": self.lora_A}
        parts["lora_A"], index = self.lora_A_packed, getattr(self, names[0])
        if not feature or index.shape[0] < self.in_features:
            parts |= {"frozen_A": self.frozen_A, names[0]: index}
        return parts

    def factors_dtype(self) -> torch.dtype:
        return self.lora_B_packed.dtype

    def _loadable(self, found: Selection) -> bool:
        shapes = selection.mask_shapes(self.partial, self.site)
        return all(
            shape is None
            or (mask is not None and mask.dtype == torch.bool and mask.shape == shape and not mask.is_meta)
            for mask, shape in zip(found, shapes, strict=True)
        )

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """A selection of another size (a short last block, scores) comes with packed tensors of that size."""
        names = ("lora_B",) if self.freeze_A else ("lora_A", "lora_B")
        found = Selection(*(state_dict.get(f"{prefix}{name}") for name in Selection._fields))
        packed = {name: state_dict.get(f"{prefix}{name}_packed") for name in names}
        if self._loadable(found) and all(value is not None for value in packed.values()):
            found = found._replace(active_A=None if self.freeze_A else found.active_A)
            device = found.active_B.device if self.active_B.is_meta else self.active_B.device
            before = {name: self._buffers[name] for name in self._indices(found)}
            for name, index in self._indices(found).items():
                setattr(self, name, index.to(device))
            if all(tuple(value.shape) == self._packed_shape(name[-1]) for name, value in packed.items()):
                for name, value in packed.items():
                    parameter = self._parameters[f"{name}_packed"]
                    if parameter.shape != value.shape:
                        parameter.data, parameter.grad = parameter.new_empty(value.shape), None
            else:
                self._buffers.update(before)
        frozen_B = state_dict.get(f"{prefix}frozen_B")
        if frozen_B is not None and self.frozen_B is None:
            self.frozen_B = self.lora_B_packed.new_zeros((self.out_features, self.r))
        elif frozen_B is None and f"{prefix}lora_B_packed" in state_dict:
            self.frozen_B = None
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self._note_columns(self.selection())
        if self.frozen_B is not None and not self.frozen_B.is_meta and not self.frozen_B.any():
            self.frozen_B = None


_owners = WeakIdKeyDictionary()
_resampled = weakref.WeakSet()


def find_owners() -> None:
    """Know the Parameters that adapters hold now; fully_shard puts others in their place."""
    for adapter in _resampled:
        adapter._own()


def owner(parameter: Tensor) -> "tuple[ResampledAdapter, str] | None":
    """The adapter whose selection rules this dense Parameter, and which factor it is, "A" or "B"."""
    reference, factor = _owners.get(parameter, (None, ""))
    adapter = reference and reference()
    return adapter and (adapter, factor)


class ResampledAdapter(PartialAdapter):
    """A selection that changes: Parameters lora_A, lora_B are dense, for lorasp.optim.PartialAdamW to train in part.

    Gradients are exactly zero outside the selection; a factor frozen whole ("matrix") gets none.
    """

    def _create(self, device: torch.device, dtype: torch.dtype) -> None:
        self._aliases: dict[str, Tensor] = {}
        chosen = selection.draw(self.partial, self.site)
        self._hold_masks(chosen, device)
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device=device))
        if self.partial.granularity == "feature":
            for name, index in self._indices(chosen).items():
                self.register_buffer(name, index.to(device), persistent=False)
        self._note_matrix(chosen)
        super()._create(device, dtype)

    def _note_matrix(self, chosen: Selection) -> None:
        matrix = self.partial.granularity == "matrix"
        self._rests_A, self._rests_B = (matrix and not bool(active) for active in chosen)

    def reset_parameters(self) -> None:
        """Draw A, and B or zeros, as init_lora_weights says, and the first selection as its seed says."""
        self.draws.zero_()
        self.choose(selection.draw(self.partial, self.site))
        drawn, zeroed = (self.lora_B, self.lora_A) if self._rests_B else (self.lora_A, self.lora_B)
        self._fill(drawn, zeroed)

    def choose(self, chosen: Selection) -> None:
        values = {name: value for name, value in zip(Selection._fields, chosen, strict=True) if value is not None}
        if self.partial.granularity == "feature":
            values |= self._indices(chosen)
        for name, value in values.items():
            have = getattr(self, name)
            if have.shape == value.shape:
                have.copy_(value)
            else:
                setattr(self, name, value.to(have.device))
        self._note_matrix(chosen)
        self._note_columns(chosen)

    def resample(self) -> None:
        """Go on to the next selection. Values and optimizer state stay as they are."""
        self.draws += 1
        self.choose(selection.draw(self.partial, self.site, self.drawn()))

    def drawn(self) -> int:
        return 0 if self.draws.is_meta else int(self.draws)

    def active(self, factor: str) -> Tensor:
        """Where this factor trains now: bool, broadcastable to it."""
        return self.active_A if factor == "A" else self.active_B

    def parts(self) -> dict[str, Tensor]:
        lora_A = self._at_rest("lora_A") if self._rests_A else self.lora_A
        lora_B = self._at_rest("lora_B") if self._rests_B else self.lora_B
        parts = {"lora_A": lora_A, "lora_B": lora_B}
        if self.partial.granularity == "feature":
            return parts | {"columns": self._buffers.get("columns"), "rows": self.rows}
        if self.partial.granularity == "matrix":
            return parts
        mask_A = None if self.freeze_A else self.active_A.expand(self.r, self.in_features)
        return parts | {"mask_A": mask_A, "mask_B": self.active_B.expand(self.out_features, self.r)}

    def _at_rest(self, name: str) -> Tensor:
        """The parameter without gradient: one object for as long as it has one storage, so that it compares as same."""
        parameter = self._parameters[name]
        if torch.compiler.is_compiling():
            return parameter.detach()
        alias = self._aliases.get(name)
        if alias is None or alias.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
            alias = self._aliases[name] = parameter.detach()
        return alias

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_aliases": {}}

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._own()

    def _own(self) -> None:
        _resampled.add(self)
        for name, parameter in self._parameters.items():
            _owners[parameter] = weakref.ref(self), name[-1]

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._own()

    def _apply(self, fn, recurse: bool = True):
        result = super()._apply(fn, recurse)
        self._own()
        return result

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        chosen = self.selection()
        if any(f"{prefix}{name}" in state_dict for name in Selection._fields) and not chosen.active_B.is_meta:
            self.choose(chosen)

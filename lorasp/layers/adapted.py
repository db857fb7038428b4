"""AdaptedLinear: a frozen linear layer's named adapters: which one is active, what it is made of, merging."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorasp.adapter.adapter import Adapter
from lorasp.adapter.partial import make_adapter
from lorasp.adapter.partial_adapter import PartialAdapter
from lorasp.config import LoRAConfig
from lorasp.sharding import is_sharded


class AdaptedLinear(nn.Module):
    """What every adapted layer has besides its forward: `adapters`, a ModuleDict of which one is active at a time.

    Subclasses call hold_adapter() once weight (out_features, in_features; the other way round with fan_in_fan_out),
    in_features and out_features stand.
    """

    weight: nn.Parameter
    in_features: int
    out_features: int
    fan_in_fan_out: bool
    enabled = True

    def hold_adapter(self, adapter_name: str, arguments: dict, name: str, peers: Sequence[str]) -> None:
        """Begin with one adapter, the active one; arguments: LoRAConfig.adapter_arguments()."""
        self.active_adapter = adapter_name
        self.merged_adapter: str | None = None
        self._base_weight: nn.Parameter | None = None  # while merged, unless it was given up
        self.adapters = nn.ModuleDict({adapter_name: self._make_adapter(arguments, name, peers)})

    def _make_adapter(self, arguments: dict, name: str, peers: Sequence[str]) -> Adapter:
        """arguments: LoRAConfig.adapter_arguments()."""
        arguments = {key: value for key, value in arguments.items() if key not in ("prepack", "adapter_dtype")} | {
            "name": name, "peers": peers, "device": self.weight.device, "dtype": self._adapter_dtype(arguments)
        }  # fmt: skip
        return make_adapter(self.in_features, self.out_features, **arguments)

    def _adapter_dtype(self, arguments: dict) -> torch.dtype:
        dtype = arguments["adapter_dtype"] or self.weight.dtype
        if dtype.itemsize < self.weight.dtype.itemsize:
            raise ValueError(f"LoRALinear: adapter_dtype must be None for {self.weight.dtype}, got {dtype}")
        return dtype

    def make_adapter(self, config: LoRAConfig, name: str = "", peers: Sequence[str] = ()) -> Adapter:
        """An adapter that fits this layer, as config says and beside() explains, not yet part of the layer."""
        return self._make_adapter(config.adapter_arguments(), name, peers).train(self.training)

    def add_adapter(self, adapter_name: str, config: LoRAConfig) -> None:
        """Another adapter over the same weight: not active, not training. config.prepack is the layer's to say.

        Raises ValueError for a name that is taken or that no module can have.
        """
        check_adapter_name("add_adapter", adapter_name)
        if adapter_name in self.adapters:
            raise ValueError(f"add_adapter: adapter_name must be new, got {adapter_name!r} of {list(self.adapters)}")
        self.adapters[adapter_name] = self.make_adapter(config).requires_grad_(False)

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter the active one; its parameters require grad, the others' do not. lorasp.set_adapter: a model.

        A name the layer does not have leaves the frozen layer alone. Raises ValueError while merged.
        """
        if self.merged_adapter is not None:
            raise ValueError(f"set_adapter: the layer must not be merged, {self.merged_adapter!r} is; unmerge() first")
        self.active_adapter = adapter_name
        for name, adapter in self.adapters.items():
            adapter.requires_grad_(name == adapter_name)

    def active(self) -> Adapter:
        """The active adapter. Raises ValueError where the layer has none of that name."""
        if self.active_adapter not in self.adapters:
            raise ValueError(
                f"LoRALinear: active_adapter must be one of {', '.join(self.adapters)} here, "
                f"got {self.active_adapter!r}"
            )
        return self.adapters[self.active_adapter]

    @property
    def lora_A(self) -> Tensor:
        return self.active().dense_A()

    @property
    def lora_B(self) -> Tensor:
        return self.active().dense_B()

    def set_lora(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Give the active adapter these values, (r, in_features) and (out_features, r), frozen entries included."""
        for name, value, have in (("lora_A", lora_A, self.lora_A), ("lora_B", lora_B, self.lora_B)):
            if not isinstance(value, Tensor) or value.shape != have.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"set_lora: {name} must be {tuple(have.shape)}, got {got}")
        self.active().set_dense(lora_A, lora_B)

    def trainable_mask_A(self) -> Tensor:
        """bool (r, in_features): the entries of lora_A that train (by freeze_A and partial; requires_grad aside)."""
        return self.active().trainable_mask_A()

    def trainable_mask_B(self) -> Tensor:
        """bool (out_features, r): the entries of lora_B that train."""
        return self.active().trainable_mask_B()

    def select(self, score_A: Tensor | None, score_B: Tensor) -> None:
        """Choose what of the active adapter trains by scores per entry: the highest are kept (per block, row: the sum).

        score_A (r, in_features), None where A is frozen; score_B (out_features, r). lora_A and lora_B stay as they are;
        make the optimizer afterwards. Layers on one input: see lorasp.select. Raises ValueError.
        """
        adapter = self.active()
        if not isinstance(adapter, PartialAdapter):
            raise ValueError("select: the layer must have a PartialConfig of granularity feature, element or rank")
        adapter.select(score_A, score_B)

    def share_selection(self, shared: str) -> None:
        """Let adapters with a PartialConfig draw the columns of A under `shared`, as all layers on this input do."""
        for adapter in self.adapters.values():
            if isinstance(adapter, PartialAdapter):
                adapter.share(shared)

    @property
    def scale(self) -> float:
        return self.active().scale

    def reset_lora_parameters(self) -> None:
        """Draw the active adapter's lora_A and lora_B again, as its init_lora_weights says."""
        self.active().reset_parameters()

    def base_weight(self) -> nn.Parameter:
        """The weight without any adapter in it. Raises ValueError if merge(keep_base=False) gave it up."""
        if self.merged_adapter is None:
            return self.weight
        if self._base_weight is None:
            raise ValueError(
                f"LoRALinear: {self.merged_adapter!r} was merged with keep_base=False: the weight before it is gone"
            )
        return self._base_weight

    def merge(self, *, keep_base: bool = True) -> None:
        """Let a new frozen weight W + s B A, rounded once, stand in for the active adapter; A and B rest meanwhile.

        The old weight is not written to: whatever else it is tied to keeps its values, and unmerge() puts it back, the
        same Parameter. keep_base=False lets go of it. Raises ValueError if the layer is merged, for sharded weights,
        and if the new weight is not finite where the old one is.
        """
        if self.merged_adapter is not None:
            raise ValueError(f"merge: the layer must not be merged, {self.merged_adapter!r} is")
        adapter, base = self.active(), self.weight
        if is_sharded(base):
            raise ValueError("merge: weight must be whole, got a shard (DTensor); merge in a model of one process")
        wide = torch.float64 if base.dtype == torch.float64 else torch.float32
        # The weight is for every mode the caller may be in now or later.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(base.device.type, enabled=False):
            update = adapter.scale * (adapter.dense_B().to(wide) @ adapter.dense_A().to(wide))
            merged = update.add_(base.t() if self.fan_in_fan_out else base)
            merged = (merged.t() if self.fan_in_fan_out else merged).to(base.dtype).contiguous()
            if not base.is_meta and not (merged.isfinite() | ~base.isfinite()).all():
                raise ValueError(f"merge: W + s B A must be finite, it is not for adapter {self.active_adapter!r}")
            self.weight = nn.Parameter(merged, requires_grad=False)
        self.merged_adapter = self.active_adapter
        # Past nn.Module.__setattr__: no Parameter of the layer's while another stands in for it.
        self.__dict__["_base_weight"] = base if keep_base else None

    def unmerge(self) -> None:
        """Undo merge(), to the bit. Raises ValueError if the layer is not merged or the old weight was let go of."""
        if self.merged_adapter is None:
            raise ValueError("unmerge: the layer must be merged")
        self.weight = self.base_weight()
        self.merged_adapter = self._base_weight = None

    def _apply(self, fn, recurse: bool = True):
        if self._base_weight is not None:
            with torch.no_grad():
                # The Parameter stays the same object: it may be tied, and unmerge() gives it back.
                self._base_weight.data = fn(self._base_weight.data)
        return super()._apply(fn, recurse)


def check_adapter_name(where: str, name: str) -> None:
    """An adapter's name is a key of nn.ModuleDict and a part of the keys of a state_dict."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{where}: the adapter's name must be a str without dots, no name nn.ModuleDict uses itself, got {name!r}"
        )

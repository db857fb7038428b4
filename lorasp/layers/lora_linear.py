"""LoRALinear: a frozen linear layer with low-rank adapters beside it, a thin module over lora_linear and its group."""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorasp.config import LoRAConfig, PartialConfig, check_adapter
from lorasp.functional import PackedWeight, lora_linear, pack_weight
from lorasp.functional.arguments import autocast_dtype, seed_tensor, surroundings
from lorasp.functional.lora_linear import constants as whole_constants
from lorasp.functional.lora_linear_group import LoRALinearPartFunction, constants
from lorasp.layers.adapted import AdaptedLinear
from lorasp.layers.shared_input import SharedInput, kinds_of_parts, linear_group, taken_as_they_are
from lorasp.ops import registry
from lorasp.ops.lora_linear import LoRALinearFunction
from lorasp.sharding import is_managed

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEFAULT_ADAPTER = "default"


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (GPT-2): a linear layer whose weight is stored (in, out)."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


class Operands(NamedTuple):
    """What one call of a layer computes with, as the operators take it; the fields of a selection are None without one.

    weight (N, K), transposed back where it is stored (K, N); dropout_p: as in force now; frozen_A and all after it: the
    fields of the same name of lora_linear_group.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scale: float
    dropout_p: float
    packed: PackedWeight | None = None
    frozen_A: Tensor | None = None
    frozen_B: Tensor | None = None
    columns: Tensor | None = None
    rows: Tensor | None = None
    entries_A: Tensor | None = None
    entries_B: Tensor | None = None
    mask_A: Tensor | None = None
    mask_B: Tensor | None = None


class _Packed(NamedTuple):
    """A packed weight and the state of the weight it was made from."""

    made_from: tuple
    weight: PackedWeight


class LoRALinear(AdaptedLinear):
    """y = x W^T + bias + s drop(x) A^T B^T: nn.Linear with its weight frozen and a low-rank adapter that trains.

    in_features, out_features, bias, device, dtype: nn.Linear's. The rest is PEFT's: r, lora_alpha, lora_dropout (in
    training mode only), use_rslora, init_lora_weights, and LoRAConfig's freeze_A, prepack, adapter_dtype, partial.

    x (..., in_features) -> y (..., out_features) in x's dtype. weight (out_features, in_features) and bias do not
    require grad; set requires_grad_(True) and they train too. lora_A (r, in_features), lora_B (out_features, r) and
    scale are the active adapter's; in the state_dict they are adapters.<name>.lora_A and .lora_B. Of several adapters
    (add_adapter) one is active; where the layer has none of that name, or enabled is False, it is the frozen layer
    alone. merge() puts the adapter into a new weight and keeps the old one for unmerge().

    partial (LoRA-SP): what trains is in adapters.<name>.lora_A_packed and .lora_B_packed, beside the masks active_A and
    active_B of the selection; lora_A and lora_B are then put together on every read, so writing to them changes nothing
    (set_lora does). With resample they stay Parameters of full size. See PartialConfig for what is frozen, and for what
    the paper says of it.

    prepack: the packed copies are made at the first forward and again when the weight's storage, version, dtype or
    device changes. A write through `weight.data` changes none of these: call `weight.data = ...` or drop_packed().
    Under torch.compile the plain weight is used; under fully_shard the first forward raises ValueError.

    Raises ValueError or TypeError for sizes, dtypes and adapter arguments that do not fit.
    Sources: LoRA arXiv 2106.09685; LoRA-FA arXiv 2308.03303; LoRA-SP arXiv 2403.08822.
    """

    shared_input: SharedInput | None = None
    shared_index = 0
    fan_in_fan_out = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        freeze_A: bool = False,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        prepack: bool = False,
        adapter_dtype: torch.dtype | None = None,
        partial: PartialConfig | None = None,
    ):
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"LoRALinear: {name} must be an int >= 1, got {size!r}")
        arguments = {
            "r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "freeze_A": freeze_A,
            "use_rslora": use_rslora, "init_lora_weights": init_lora_weights, "prepack": prepack,
            "adapter_dtype": adapter_dtype, "partial": partial,
        }  # fmt: skip
        check_adapter("LoRALinear", **arguments)
        dtype = dtype or torch.get_default_dtype()
        if dtype not in DTYPES:
            raise TypeError(f"LoRALinear: dtype must be {', '.join(map(str, DTYPES))}, got {dtype}")
        super().__init__()
        weight = nn.Parameter(torch.empty((out_features, in_features), device=device, dtype=dtype), requires_grad=False)
        zeros = nn.Parameter(weight.new_empty(out_features), requires_grad=False) if bias else None
        self._adopt(weight, zeros, False, arguments)
        self._reset_base()

    @classmethod
    def from_linear(cls, linear: nn.Module, config: LoRAConfig) -> "LoRALinear":
        """A LoRALinear beside `linear` (nn.Linear or transformers' Conv1D): its Parameters themselves, now frozen.

        The bias stays trainable unless config.bias is "none". Training mode is kept. Raises TypeError for any other
        layer and for dtypes lora_linear does not take.
        """
        layer = cls.beside(linear, config)
        layer.weight.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(config.bias != "none")
        return layer

    @classmethod
    def beside(
        cls,
        linear: nn.Module,
        config: LoRAConfig,
        name: str = "",
        peers: Sequence[str] = (),
        adapter: str = DEFAULT_ADAPTER,
    ) -> "LoRALinear":
        """from_linear without touching the Parameters' requires_grad.

        name, and peers, the names of all layers adapted together: what config.partial draws its selection from.
        adapter: what the adapter is called.
        """
        if not isinstance(config, LoRAConfig):
            raise TypeError(f"LoRALinear.from_linear: config must be a LoRAConfig, got {type(config).__name__}")
        if not isinstance(linear, nn.Linear) and not is_conv1d(linear):
            raise TypeError(f"LoRALinear.from_linear: linear must be nn.Linear or Conv1D, got {type(linear).__name__}")
        if not isinstance(linear.weight, nn.Parameter):
            raise TypeError("LoRALinear.from_linear: weight must be a Parameter, got a computed one")
        if type(linear.weight) is not nn.Parameter:
            raise TypeError(
                f"LoRALinear.from_linear: weight must be a plain Parameter, got a {type(linear.weight).__name__} "
                "(quantised layers: inject(), QuantizedLoRALinear.from_linear)"
            )
        if linear.weight.dtype not in DTYPES:
            raise TypeError(
                f"LoRALinear.from_linear: weight must be {', '.join(map(str, DTYPES))}, got {linear.weight.dtype}"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(linear.weight, linear.bias, is_conv1d(linear), config.adapter_arguments(), name, peers, adapter)
        return layer.train(linear.training)

    def _adopt(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        fan_in_fan_out: bool,
        arguments: dict,
        name: str = "",
        peers: Sequence[str] = (),
        adapter: str = DEFAULT_ADAPTER,
    ) -> None:
        self.fan_in_fan_out = fan_in_fan_out
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = weight.t().shape if fan_in_fan_out else weight.shape
        self._begin(arguments, name, peers, adapter)

    def _begin(self, arguments: dict, name: str, peers: Sequence[str], adapter: str) -> None:
        """All that is not the frozen weight; arguments: LoRAConfig.adapter_arguments()."""
        self.prepack = arguments["prepack"]
        # Save x itself where x[:, J] would do: something else keeps this x alive anyway.
        self.keep_input = False
        self._packed: _Packed | None = None
        self._checked: tuple = (None, None)
        self.hold_adapter(adapter, arguments, name, peers)

    def forward(self, x: Tensor) -> Tensor:
        # Traced, the layers of a group compute apart: a round lives in weak references, which no graph can hold.
        if self.shared_input is not None and not torch.compiler.is_compiling():
            return self.shared_input(self, x)
        return self.compute(x)

    def compute(
        self, x: Tensor, operands: Operands | None = None, *, seed: Tensor | None = None, member: int = 0
    ) -> Tensor:
        """forward() of this layer alone; seed, member: of its dropout mask."""
        o = operands or self._operands()
        if o is None:
            return self._frozen(x)
        if o.columns is o.rows is o.entries_A is o.entries_B is None and member == 0:
            return self._compute_whole(x, o, seed)
        # Traced members would keep a copy of x[:, J] each: x itself is no more than two of them.
        keep_input = self.keep_input or (self.shared_input is not None and torch.compiler.is_compiling())
        return self._compute_part(x, o, seed, member, keep_input)

    def _compute_whole(self, x: Tensor, o: Operands, seed: Tensor | None) -> Tensor:
        """lora_linear of this layer; what it checks is not checked again while sizes, dtypes and devices stay."""
        if torch.compiler.is_compiling() or o.packed is not None or o.mask_A is not None or o.mask_B is not None:
            return self._lora_linear(x, o, seed)
        found = isinstance(x, Tensor) and self._found(x, o)
        checked, how = self._checked
        if found != checked:
            y = self._lora_linear(x, o, seed)
            self._remember(found, whole_constants(x, o.weight, o.scale, o.dropout_p, "auto"), o)
            return y
        seed = seed_tensor("LoRALinear", seed, x.device) if how.dropout_p else None
        return LoRALinearFunction.apply(
            x, o.weight, o.bias, o.lora_A, o.lora_B, None, None, seed, None, None, how.scale, how.dropout_p, 0,
            how.dtype, how.backend, how.plan,
        )  # fmt: skip

    def _lora_linear(self, x: Tensor, o: Operands, seed: Tensor | None) -> Tensor:
        return lora_linear(
            x, o.weight, o.lora_A, o.lora_B, o.bias, scale=o.scale, dropout_p=o.dropout_p, seed=seed,
            mask_A=o.mask_A, mask_B=o.mask_B, packed=o.packed,
        )  # fmt: skip

    def _found(self, x: Tensor, o: Operands, *more: object) -> tuple:
        """All that a call's checks and its constants depend on."""
        return (
            x.dtype, x.device, x.shape[-1:], surroundings(x), o.scale, o.dropout_p, self.active_adapter,
            o.weight.dtype, o.weight.device, o.weight.shape, o.lora_A.dtype, o.lora_A.device, o.lora_A.shape,
            o.lora_B.dtype, o.lora_B.device, o.lora_B.shape,
            None if o.bias is None else (o.bias.dtype, o.bias.device, o.bias.shape),
            registry.waits_for_host(x, o.weight.shape[0], "auto"), *more,
        )  # fmt: skip

    def _remember(self, found: tuple, how: NamedTuple, o: Operands) -> None:
        """What was checked, with its constants."""
        self._checked = (found if taken_as_they_are([o], how.dtype) else None), how

    def _compute_part(self, x: Tensor, o: Operands, seed: Tensor | None, member: int, keep_input: bool) -> Tensor:
        """linear_group of this layer; what it checks is not checked again while sizes, dtypes and devices stay."""
        bias_trains = o.bias is not None and o.bias.requires_grad
        if torch.compiler.is_compiling() or o.packed is not None or o.weight.requires_grad or bias_trains:
            return linear_group(x, [o], [member], seed, keep_input)[0]
        found = isinstance(x, Tensor) and self._found(x, o, keep_input, member, *kinds_of_parts(o))
        checked, how = self._checked
        if found != checked or o.mask_A is not None or o.mask_B is not None:
            (y,) = linear_group(x, [o], [member], seed, keep_input)
            self._remember(found, constants(x, [o.weight], [o.scale], o.dropout_p, [member], keep_input, "auto"), o)
            return y
        if how.dropout_p:
            seed = seed_tensor("LoRALinear", seed, x.device)
        return LoRALinearPartFunction.apply(
            x, seed, o.columns, how, o.weight, o.bias, o.lora_A, o.lora_B, o.frozen_A, o.frozen_B, o.rows, o.entries_A,
            o.entries_B,
        )  # fmt: skip

    def _frozen(self, x: Tensor) -> Tensor:
        """The layer where no adapter acts: merged, disabled, or without the active one."""
        weight = self.weight
        if self.merged_adapter is not None and not self.enabled:
            weight = self.base_weight()
        return nn.functional.linear(x, weight.t() if self.fan_in_fan_out else weight, self.bias)

    def _operands(self) -> Operands | None:
        """None where no adapter acts."""
        # Past nn.Module.__getattr__, which is most of a call's time where the parameters are where they should be.
        adapter = self._modules["adapters"]._modules.get(self.active_adapter)
        if adapter is None or not self.enabled or self.merged_adapter is not None:
            return None
        stored = self._parameters
        weight, bias = (stored["weight"], stored["bias"]) if len(stored) == 2 else (self.weight, self.bias)
        if self.fan_in_fan_out:
            weight = weight.t()
        return Operands(
            weight=weight,
            bias=bias,
            scale=adapter.scale,
            dropout_p=adapter.lora_dropout if self.training else 0.0,
            packed=self._current_pack(weight) if self.prepack and not torch.compiler.is_compiling() else None,
            **adapter.parts(),
        )

    def merge(self, *, keep_base: bool = True) -> None:
        super().merge(keep_base=keep_base)
        self.drop_packed()

    def _current_pack(self, weight: Tensor) -> PackedWeight:
        dtype = autocast_dtype(weight) or weight.dtype
        state = (weight.data_ptr(), weight._version, weight.device, weight.dtype, dtype)
        if self._packed is None or self._packed.made_from != state:
            if is_managed(self):
                raise ValueError("LoRALinear: prepack must be False under fully_shard: packed copies cannot be sharded")
            self._packed = None  # frees the old copies first
            self._packed = _Packed(state, pack_weight(weight.detach().to(dtype)))
        return self._packed.weight

    @property
    def packed(self) -> PackedWeight | None:
        """The packed copies of the weight, if a forward has made them."""
        return self._packed and self._packed.weight

    def drop_packed(self) -> None:
        """Forget the packed copies of the weight; the next forward makes them again."""
        self._packed = None

    def reset_parameters(self) -> None:
        """Draw weight and bias as nn.Linear does, and every adapter: what a layer made on the meta device needs."""
        self._reset_base()
        for adapter in self.adapters.values():
            adapter.reset_parameters()

    def _reset_base(self) -> None:
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.weight.t() if self.fan_in_fan_out else self.weight, a=math.sqrt(5))
            if self.bias is not None:
                bound = 1 / math.sqrt(self.in_features)
                self.bias.uniform_(-bound, bound)

    def _apply(self, fn, recurse: bool = True):
        self.drop_packed()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_packed": None, "_checked": (None, None)}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.shared_input is not None:
            self.shared_input.adopt(self)

    def extra_repr(self) -> str:
        words = [f"{name}={getattr(self, name)}" for name in ("in_features", "out_features")]
        words += [f"bias={self.bias is not None}"]
        words += ["fan_in_fan_out=True"] * self.fan_in_fan_out + ["prepack=True"] * self.prepack
        words += [f"active_adapter={self.active_adapter!r}"] * (list(self.adapters) != [self.active_adapter])
        words += ["enabled=False"] * (not self.enabled)
        return ", ".join(words + [f"merged_adapter={self.merged_adapter!r}"] * (self.merged_adapter is not None))

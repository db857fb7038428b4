"""FusedLayer: PEFT's LoRA layer over a linear layer, with its forward through lorasp's operators.

A layer becomes one by its class alone: parameters, names, attributes and every other method are PEFT's. This file
imports peft; peft.py, which puts the class in, does not.
"""

import math
from typing import NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lorasp.functional import lora_linear, lora_update
from lorasp.functional.arguments import autocast_dtype
from lorasp.layers.lora_linear import DTYPES, Operands
from lorasp.layers.shared_input import SharedInput, linear_group

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = frozenset(DTYPES)
_AUTOCAST = _DTYPES - {torch.float64}


class Factors(NamedTuple):
    """What one adapter brings to a call; dropout_p: as in force now."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    dropout_p: float


class FusedLayer:
    """What stands before a LoRA layer class of PEFT's: y = base(x) + s drop(x) A^T B^T of the active adapter, fused.

    Of several active adapters the first goes with the base; lora_update adds the others, in place. What lorasp does not
    compute goes through PEFT's own forward, decided at every call: adapters switched off or merged, DoRA and other
    variants, lora_bias, keyword arguments (adapter_names, alora_offsets), hooks on the parts of the layer, dtypes that
    PEFT would cast x for, tensor subclasses, function transforms. why_not(adapter) names what lies in an adapter and
    not in the call.

    frozen_A holds LoRA-FA's line: PEFT's set_adapter and all that call it (disable_adapter on its way out,
    enable_adapters, delete_adapter, add_adapter) and set_requires_grad let every parameter of an adapter train.
    """

    frozen_A: dict[str, bool]  # adapter whose A stays frozen -> whether PEFT would train it
    freeze_A: bool  # adapters to come are held too

    def _acting(self) -> tuple[Factors, ...]:
        """The active adapters; none where PEFT's own forward serves the call."""
        # Past nn.Module.__getattr__, which is most of a call's time.
        parts = self._modules
        factors_A = parts["lora_A"]._modules
        if self._disable_adapters or self.merged_adapters or not _bare(parts["base_layer"]):
            return ()
        active = self._active_adapter
        names = [active] if isinstance(active, str) else active
        found = tuple([self._factors(name) for name in names if name in factors_A])
        return () if None in found else found

    def _factors(self, name: str) -> Factors | None:
        parts = self._modules
        lora_A, lora_B = parts["lora_A"]._modules[name], parts["lora_B"]._modules[name]
        dropout, scale = parts["lora_dropout"]._modules[name], self.scaling[name]
        if (
            name in self.lora_variant
            or type(lora_A) is not nn.Linear
            or type(lora_B) is not nn.Linear
            or lora_B.bias is not None
            or not isinstance(scale, int | float)
            or not -math.inf < scale < math.inf
            or not (_bare(lora_A) and _bare(lora_B) and _bare(dropout))
        ):
            return None
        dropout_p = _rate(dropout)
        factor_A, factor_B = lora_A._parameters.get("weight"), lora_B._parameters.get("weight")
        if dropout_p is None or factor_A is None or factor_B is None:
            return None
        if factor_A.requires_grad and name in self.frozen_A:
            self.hold()
        return Factors(factor_A, factor_B, scale, dropout_p)

    def why_not(self, adapter: str) -> str | None:
        """Why calls with this adapter go through PEFT's own forward; None where they need not."""
        base, lora_A, lora_B = self.base_layer, self.lora_A[adapter], self.lora_B[adapter]
        dropout, scale = self.lora_dropout[adapter], self.scaling[adapter]
        if adapter in self.lora_variant:
            return f"{type(self.lora_variant[adapter]).__name__} is not plain LoRA"
        for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
            if type(factor) is not nn.Linear:
                return f"its {name} is a {type(factor).__name__}"
        if lora_B.bias is not None:
            return "lora_bias"
        if not isinstance(scale, int | float) or not -math.inf < scale < math.inf:
            return f"its scaling is {scale!r}"
        for name, part in (("base_layer", base), ("lora_A", lora_A), ("lora_B", lora_B), ("lora_dropout", dropout)):
            if not _bare(part):
                return f"its {name} has hooks or a forward of its own"
        if _rate(dropout, training=True) is None:
            return f"its lora_dropout is {dropout!r}"
        return self._misfit(lora_A.weight.dtype, lora_B.weight.dtype)

    def _misfit(self, *factors: torch.dtype) -> str | None:
        """Why PEFT would cast x for factors of these dtypes."""
        raise NotImplementedError

    def hold(self) -> None:
        """Freeze every A that stays frozen again."""
        factors = self._modules["lora_A"]._modules
        if self.freeze_A:
            for adapter in factors:
                self.frozen_A.setdefault(adapter, True)
        for adapter in self.frozen_A:
            if adapter in factors and factors[adapter].weight.requires_grad:
                factors[adapter].weight.requires_grad_(False)

    def release(self) -> None:
        """Hold no A any more; those that PEFT would train do again, where their B does."""
        for adapter, trains in self.frozen_A.items():
            if trains and adapter in self.lora_A:
                self.lora_A[adapter].weight.requires_grad_(self.lora_B[adapter].weight.requires_grad)
        self.frozen_A, self.freeze_A = {}, False

    def set_adapter(self, *args, **kwargs) -> None:
        super().set_adapter(*args, **kwargs)
        self.hold()

    def set_requires_grad(self, *args, **kwargs) -> None:
        super().set_requires_grad(*args, **kwargs)
        self.hold()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.frozen_A.pop(adapter_name, None)


def add_others(y: Tensor, x: Tensor, others: tuple[Factors, ...]) -> Tensor:
    """y with the updates of the adapters that are active beside the first one."""
    for o in others:
        y = lora_update(y, x, o.lora_A, o.lora_B, scale=o.scale, dropout_p=o.dropout_p)
    return y


class FusedLinear(FusedLayer, Linear):
    """PEFT's lora.Linear over nn.Linear or Conv1D, through lora_linear. Member of a SharedInput like LoRALinear."""

    shared_input: SharedInput | None = None
    shared_index = 0
    keep_input = False  # only LoRA-SP could save less than x

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        acting = () if args or kwargs else self._acting()
        operands = self._beside_base(acting[0]) if acting else None
        if operands is None or not self._serves(x, operands, acting):
            self.hold()
            return super().forward(x, *args, **kwargs)
        if len(acting) > 1:
            return add_others(self.compute(x, operands), x, acting[1:])
        if self.shared_input is not None and not torch.compiler.is_compiling():
            return self.shared_input(self, x, operands)
        return self.compute(x, operands)

    def compute(self, x: Tensor, operands: Operands, *, seed: Tensor | None = None, member: int = 0) -> Tensor:
        """forward() of this layer alone and of one adapter; seed, member: of its dropout mask."""
        if member:
            return linear_group(x, [operands], [member], seed, self.keep_input)[0]
        o = operands
        return lora_linear(
            x, o.weight, o.lora_A, o.lora_B, o.bias, scale=o.scale, dropout_p=o.dropout_p, seed=seed
        )  # fmt: skip

    def _operands(self) -> Operands | None:
        """What a call computes with; None where it takes more than one adapter or PEFT's own forward."""
        acting = self._acting()
        return self._beside_base(acting[0]) if len(acting) == 1 else None

    def _beside_base(self, factors: Factors) -> Operands | None:
        base = self._modules["base_layer"]
        stored = base._parameters
        weight = stored.get("weight")
        if weight is None or "bias" not in stored:
            return None
        if type(base).forward is not nn.Linear.forward:
            if type(base).forward is not Conv1D.forward:
                return None
            weight = weight.t()
        return Operands(weight, stored["bias"], *factors)

    def _serves(self, x: Tensor, o: Operands, acting: tuple[Factors, ...]) -> bool:
        """Whether lora_linear computes PEFT's function of these tensors, without a copy of x in another dtype."""
        if not plain(x, acting) or type(o.weight) not in _PLAIN or not (o.bias is None or type(o.bias) in _PLAIN):
            return False
        around = {x.dtype, o.weight.dtype, x.dtype if o.bias is None else o.bias.dtype}
        factors = {factor.dtype for adapter in acting for factor in adapter[:2]}
        dtype = autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None
        if dtype is not None:
            return around <= _AUTOCAST and factors <= {dtype, torch.float32}
        masters = x.dtype.itemsize == 2 and self.cast_input_dtype_enabled
        return around == {x.dtype} <= _DTYPES and factors <= ({x.dtype, torch.float32} if masters else {x.dtype})

    def _misfit(self, *factors: torch.dtype) -> str | None:
        weight = self.base_layer.weight.dtype
        if set(factors) <= ({weight, torch.float32} if weight.itemsize == 2 else {weight}):
            return None
        return f"PEFT casts x for its factors of {', '.join(sorted({str(dtype) for dtype in factors}))} over {weight}"

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.shared_input is not None:
            self.shared_input.adopt(self)


def obstacle(layer: nn.Module) -> str | None:
    """Why this lora.Linear of PEFT's cannot be fused, whatever its adapters; None if it can (or is)."""
    if "forward" in vars(layer):
        return "it was given a forward of its own"
    base = layer.base_layer
    kind = type(base).__name__
    if not isinstance(base, nn.Linear | Conv1D):
        return f"its base layer {kind} is not a linear layer"
    if type(base).forward not in (nn.Linear.forward, Conv1D.forward) or "forward" in vars(base):
        return f"its base layer {kind} has a forward of its own"
    weight = base._parameters.get("weight")
    if weight is None or "bias" not in base._parameters:
        return "its base weight or bias is computed, not stored (parametrised)"
    # fully_shard keeps a DTensor there, and the plain weight while forward runs.
    if (type(weight) is not nn.Parameter and not isinstance(weight, DTensor)) or weight.dtype not in _DTYPES:
        return f"its base weight is a {type(weight).__name__} of {weight.dtype}"
    return None


def plain(x: Tensor, acting: tuple[Factors, ...]) -> bool:
    """Whether x and the factors are tensors that nothing but backward is asked of."""
    return (
        type(x) in _PLAIN
        and all(type(factor) in _PLAIN for adapter in acting for factor in adapter[:2])
        and (torch.compiler.is_compiling() or _differentiable())
    )


def _bare(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _rate(dropout: nn.Module, training: bool | None = None) -> float | None:
    """The rate in force (training: if it were in that mode); None where lora_linear drops otherwise."""
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout:
        return None
    if not (dropout.training if training is None else training):
        return 0.0
    # Masks are of 16 bits: at the rate of 1 nothing is left to rescale.
    return None if dropout.inplace or dropout.p >= 1 - 2**-17 else dropout.p


def _differentiable() -> bool:
    """Whether backward is the only derivative asked for: lora_linear has no forward mode and no function transforms."""
    return forward_ad._current_level < 0 and torch._C._functorch.peek_interpreter_stack() is None

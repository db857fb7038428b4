"""FusedLinear: PEFT's LoRA layer over a linear layer, with its forward through lora_linear.

A layer becomes one by its class alone: parameters, names, attributes and every other method are PEFT's. This file
imports peft; peft.py, which puts the class in, does not.
"""

import math

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lorasp.functional import lora_linear
from lorasp.functional.arguments import autocast_dtype
from lorasp.nn import DTYPES, Operands
from lorasp.shared_input import SharedInput, linear_group

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = frozenset(DTYPES)
_AUTOCAST = _DTYPES - {torch.float64}


class FusedLinear(Linear):
    """PEFT's lora.Linear: y = x W^T + bias + s drop(x) A^T B^T of the active adapter in one operator.

    What lora_linear does not compute goes through PEFT's own forward, decided at every call: adapters switched off or
    merged, several active at once, DoRA and other variants, lora_bias, keyword arguments (adapter_names,
    alora_offsets), hooks on the parts of the layer, dtypes that PEFT would cast x for, tensor subclasses, function
    transforms. why_not(adapter) names what lies in an adapter and not in the call.

    Member of a SharedInput like LoRALinear. frozen_A holds LoRA-FA's line: PEFT's set_adapter and all that call it
    (disable_adapter on its way out, enable_adapters, delete_adapter, add_adapter) and set_requires_grad let every
    parameter of an adapter train.
    """

    shared_input: SharedInput | None = None
    shared_index = 0
    keep_input = False  # only LoRA-SP could save less than x
    frozen_A: dict[str, bool]  # adapter whose A stays frozen -> whether PEFT would train it
    freeze_A: bool  # adapters to come are held too

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        operands = None if args or kwargs else self._operands()
        if operands is None or not self._serves(x, operands):
            self.hold()
            return super().forward(x, *args, **kwargs)
        if self.shared_input is not None and not torch.compiler.is_compiling():
            return self.shared_input(self, x, operands)
        return self.compute(x, operands)

    def compute(self, x: Tensor, operands: Operands, *, seed: Tensor | None = None, member: int = 0) -> Tensor:
        """forward() of this layer alone; seed, member: of its dropout mask."""
        if member:
            return linear_group(x, [operands], [member], seed, self.keep_input)[0]
        o = operands
        return lora_linear(
            x, o.weight, o.lora_A, o.lora_B, o.bias, scale=o.scale, dropout_p=o.dropout_p, seed=seed
        )  # fmt: skip

    def _operands(self) -> Operands | None:
        """What a call computes with; None where PEFT's own forward serves it."""
        # Past nn.Module.__getattr__, which is most of a call's time.
        parts = self._modules
        factors_A, base = parts["lora_A"]._modules, parts["base_layer"]
        if self._disable_adapters or self.merged_adapters:
            return None
        active = self._active_adapter
        names = [active] if isinstance(active, str) else active
        if len(names) != 1 or names[0] not in factors_A:
            names = [name for name in names if name in factors_A]
            if len(names) != 1:
                # lora_update's place: the others add s (D o x) A^T B^T to what the first one's lora_linear gives.
                return None
        (name,) = names
        lora_A, lora_B = factors_A[name], parts["lora_B"]._modules[name]
        dropout, scale = parts["lora_dropout"]._modules[name], self.scaling[name]
        if (
            name in self.lora_variant
            or type(lora_A) is not nn.Linear
            or type(lora_B) is not nn.Linear
            or lora_B.bias is not None
            or not isinstance(scale, int | float)
            or not -math.inf < scale < math.inf
            or not (_bare(base) and _bare(lora_A) and _bare(lora_B) and _bare(dropout))
        ):
            return None
        dropout_p, stored = _rate(dropout), base._parameters
        weight, factor_A, factor_B = (m._parameters.get("weight") for m in (base, lora_A, lora_B))
        if dropout_p is None or weight is None or factor_A is None or factor_B is None or "bias" not in stored:
            return None
        if type(base).forward is not nn.Linear.forward:
            if type(base).forward is not Conv1D.forward:
                return None
            weight = weight.t()
        if factor_A.requires_grad and name in self.frozen_A:
            self.hold()
        return Operands(weight, stored["bias"], factor_A, factor_B, scale, dropout_p)

    def _serves(self, x: Tensor, o: Operands) -> bool:
        """Whether lora_linear computes PEFT's function of these tensors, without a copy of x in another dtype."""
        if (
            type(x) not in _PLAIN
            or type(o.weight) not in _PLAIN
            or type(o.lora_A) not in _PLAIN
            or type(o.lora_B) not in _PLAIN
            or not (o.bias is None or type(o.bias) in _PLAIN)
            or not (torch.compiler.is_compiling() or _differentiable())
        ):
            return False
        around = {x.dtype, o.weight.dtype, x.dtype if o.bias is None else o.bias.dtype}
        factors = {o.lora_A.dtype, o.lora_B.dtype}
        dtype = autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None
        if dtype is not None:
            return around <= _AUTOCAST and factors <= {dtype, torch.float32}
        masters = x.dtype.itemsize == 2 and self.cast_input_dtype_enabled
        return around == {x.dtype} <= _DTYPES and factors <= ({x.dtype, torch.float32} if masters else {x.dtype})

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
        factors, weight = {lora_A.weight.dtype, lora_B.weight.dtype}, base.weight.dtype
        if not factors <= ({weight, torch.float32} if weight.itemsize == 2 else {weight}):
            return f"PEFT casts x for its factors of {', '.join(sorted(map(str, factors)))} over {weight}"
        return None

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

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.shared_input is not None:
            self.shared_input.adopt(self)


def obstacle(layer: nn.Module) -> str | None:
    """Why this LoRA layer of PEFT's cannot become a FusedLinear, whatever its adapters; None if it can (or is one)."""
    if type(layer) not in (Linear, FusedLinear):
        return f"{type(layer).__name__} is not PEFT's lora.Linear"
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

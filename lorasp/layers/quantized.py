"""Frozen linear layers whose weight is not a plain tensor: what computes their product, and what leads dx back.

A FrozenBase wraps the quantised layer itself. The product is the layer's own forward(), to the bit; dx = dy W goes
through the quantiser's own dequantisation, as its own backward would, but backward keeps nothing of full size:

| layer | product | temporaries of dx | what the layer by itself keeps for backward |
|---|---|---|---|
| bitsandbytes Linear4bit | gemm_4bit (CPU: W dequantised) | W in its old and in dy's dtype | nothing |
| bitsandbytes Linear8bitLt | int8 product (CPU, training: W dequantised) | W in x's dtype | x, unseen by hooks |
| torchao Int8Tensor in nn.Linear (weight only) | x and the codes cast to x's dtype | W in dy's dtype | W in x's dtype |

What backward reads of the weight (codes, statistics) is saved through save_for_backward as it stands, without a copy.
Sources: QLoRA arXiv 2305.14314; LLM.int8() arXiv 2208.07339; the backward formulas are bitsandbytes.autograd's.
"""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Standing(NamedTuple):
    """What dx needs of a weight: tensors that stand between steps, and the numbers that say how to read them."""

    tensors: tuple[Tensor, ...]
    how: Any


class FrozenBase:
    """A quantised, frozen linear layer y = x W^T + bias: its product and the dx of it.

    module is called through its own forward(), hooks aside, so that whatever it keeps track of (compute dtypes,
    packing for inference, outlier statistics) goes on as without an adapter.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    @property
    def in_features(self) -> int:
        return self.module.in_features

    @property
    def out_features(self) -> int:
        return self.module.out_features

    @property
    def bias(self) -> nn.Parameter | None:
        return self.module.bias

    @property
    def device(self) -> torch.device:
        return self.module.weight.device

    def product(self, x: Tensor, need_dx: bool) -> Tensor:
        """y (..., N) of x (..., K), without a graph: the caller's Function stands for it. need_dx: dx() will follow."""
        return self.module.forward(x)

    def standing(self) -> Standing:
        """What dx will need, once the product was made."""
        raise NotImplementedError

    def dx(self, dy: Tensor, tensors: tuple[Tensor, ...], how: Any, dtype: torch.dtype) -> Tensor:
        """dy W: a new (M, K) for dy (M, N); tensors, how: standing()'s; dtype: x's. In a dtype of the quantiser's."""
        raise NotImplementedError


class BitsAndBytes4bit(FrozenBase):
    """bitsandbytes.nn.Linear4bit. x is cast to the layer's compute_dtype and y back to x's, as the layer does.

    On CPUs with AVX512-BF16 the layer packs its weight for inference when it is called in eval mode with an x that
    needs no gradient, and rounds the statistics to bfloat16. bitsandbytes has no backward for that format: before a
    product whose dx will be asked for, the weight is unpacked again, as the layer itself does before it is saved.
    """

    def product(self, x: Tensor, need_dx: bool) -> Tensor:
        if x.numel() == 0:  # on a weight packed for inference, bitsandbytes 0.50 ends the process
            return x.new_empty((*x.shape[:-1], self.out_features))
        weight = self.module.weight
        state = getattr(weight, "quant_state", None)
        if need_dx and _is_packed(state):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
        if state is not None and not state.nested and not _is_packed(state) and state.absmax.ndim == 2:
            # bitsandbytes 0.50 unpacks the codes, here or for a state_dict, and leaves the statistics transposed.
            state.absmax = state.absmax.t().reshape(-1).float()
        return self.module.forward(x)

    def standing(self) -> Standing:
        state, weight = self.module.weight.quant_state, self.module.weight
        # A view: packing gives the Parameter itself other data, maybe before this backward. A trace can keep no view.
        codes = weight if torch.compiler.is_compiling() else weight.view(-1, 1)
        tensors, nested = (codes, state.absmax, state.code), None
        if state.nested:
            tensors += (state.offset, state.state2.absmax, state.state2.code)
            nested = state.state2.blocksize, state.state2.dtype
        how = state.shape, state.blocksize, state.quant_type, state.dtype, nested, self.module.compute_dtype
        return Standing(tensors, how)

    def dx(self, dy: Tensor, tensors: tuple[Tensor, ...], how: Any, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        codes, absmax, code, *rest = tensors
        shape, blocksize, quant_type, weight_dtype, nested, compute_dtype = how
        offset = state2 = None
        if nested is not None:
            offset, absmax2, code2 = rest
            state2 = QuantState(absmax=absmax2, code=code2, blocksize=nested[0], dtype=nested[1])
        state = QuantState(absmax, shape, code, blocksize, quant_type, weight_dtype, offset, state2)
        dy = dy.to(compute_dtype or dtype)
        return dy @ dequantize_4bit(codes.view(-1, 1), state).to(dy.dtype)


class BitsAndBytes8bit(FrozenBase):
    """bitsandbytes.nn.Linear8bitLt with int8 weights. Outliers (threshold > 0) are the product's; its dx knows none."""

    def product(self, x: Tensor, need_dx: bool) -> Tensor:
        if x.ndim in (2, 3):
            return self.module.forward(x)
        return self.module.forward(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.out_features)

    def standing(self) -> Standing:
        state = self.module.state
        return Standing((state.CB, state.SCB), None)

    def dx(self, dy: Tensor, tensors: tuple[Tensor, ...], how: Any, dtype: torch.dtype) -> Tensor:
        codes, scales = tensors
        weight = codes.to(dtype, copy=True).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
        return dy.to(dtype) @ weight


class TorchAOInt8(FrozenBase):
    """nn.Linear whose weight is a torchao Int8Tensor of weights only: per row, per tensor or in groups."""

    def standing(self) -> Standing:
        weight = self.module.weight
        by_rows = weight.block_size[-1] == weight.shape[-1]
        tensors = (weight.qdata, weight.scale) if by_rows else (weight.qdata, weight.scale, weight.zero_point)
        return Standing(tensors, (by_rows, weight.block_size, weight.dtype, type(weight)))

    def dx(self, dy: Tensor, tensors: tuple[Tensor, ...], how: Any, dtype: torch.dtype) -> Tensor:
        by_rows, block_size, weight_dtype, kind = how
        if by_rows:
            codes, scale = tensors
            return (dy * scale.to(dy.dtype).flatten()) @ codes.to(dy.dtype)
        codes, scale, zero_point = tensors
        weight = kind(codes, scale, block_size, weight_dtype, zero_point=zero_point).dequantize()
        return dy @ weight.to(dy.dtype)


def frozen_base(module: nn.Module) -> FrozenBase | str | None:
    """The FrozenBase of a quantised layer; why it cannot be one, in words; or None for a layer that is not quantised.

    Known: bitsandbytes' Linear4bit and Linear8bitLt (quantised, that is moved to their device), and nn.Linear with
    torchao's Int8WeightOnlyConfig. Other layers whose weight is of another library's tensor type get its name.
    """
    bnb = sys.modules.get("bitsandbytes.nn")
    if bnb is not None:
        for layer, find in ((bnb.Linear4bit, _base_4bit), (bnb.Linear8bitLt, _base_8bit)):
            if isinstance(module, layer):
                own = type(module).forward is not layer.forward
                return f"{type(module).__name__} has a forward of its own" if own else find(module)
    weight = vars(module).get("_parameters", {}).get("weight")
    if weight is None or not type(weight).__module__.startswith("torchao."):
        return None
    return _base_torchao(module, weight)


def frozen_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that a quantised layer holds between steps beside its Parameters and buffers, or inside of them."""
    base = frozen_base(module)
    if isinstance(base, BitsAndBytes4bit) and _is_packed(module.weight.quant_state):
        yield module.weight.quant_state.absmax
    elif isinstance(base, BitsAndBytes8bit):
        held = (module.weight.CB, module.weight.SCB, module.state.CB, module.state.SCB)
        yield from (tensor for tensor in held if tensor is not None)
    elif isinstance(base, FrozenBase):
        yield from (tensor for tensor in base.standing().tensors if tensor is not None)


def parameter_count(parameter: Tensor) -> int:
    """How many numbers a Parameter holds: of 4-bit codes, two a byte, those of the weight they stand for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _is_packed(state) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _base_4bit(module: nn.Module) -> FrozenBase | str:
    state = getattr(module.weight, "quant_state", None) or module.quant_state
    if state is None:
        return f"{type(module).__name__} is not quantised yet: move it to its device first, `.to(device)`"
    if tuple(state.shape) != (module.out_features, module.in_features):
        return f"its 4-bit weight is {tuple(state.shape)}, not (out_features, in_features)"
    return BitsAndBytes4bit(module)


def _base_8bit(module: nn.Module) -> FrozenBase | str:
    if module.state.has_fp16_weights:
        return f"{type(module).__name__} with has_fp16_weights=True keeps its weight in floating point and trains it"
    if module.weight.dtype != torch.int8:
        return f"{type(module).__name__} is not quantised yet: move it to its device first, `.to(device)`"
    return BitsAndBytes8bit(module)


def _base_torchao(module: nn.Module, weight: Tensor) -> FrozenBase | str:
    kind = type(weight).__name__
    if type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} with a weight of torchao's {kind} has a forward of its own"
    if kind != "Int8Tensor":
        return f"its weight is torchao's {kind}; of torchao's only Int8Tensor (Int8WeightOnlyConfig) is supported"
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        return "its weight is torchao's Int8Tensor with quantised activations, which have no gradient"
    return TorchAOInt8(module)

"""lora_linear and pack_weight: validate, choose a backend, call the operator."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lorasp.functional.arguments import (
    autocast_dtype,
    check_dropout,
    check_tensor,
    compute_dtypes,
    effective_rate,
    factor,
    seed_tensor,
)
from lorasp.ops import registry
from lorasp.ops.lora_linear import LoRALinearFunction


class PackedWeight(NamedTuple):
    """A frozen weight (N, K) in the CPU kernels' own layout, for the forward and for the backward product."""

    forward: Tensor
    backward: Tensor


def pack_weight(weight: Tensor) -> PackedWeight:
    """Pack a frozen CPU weight (N, K), fp32 or bf16, for both directions: two more copies of it.

    Raises ValueError where the C++ backend has no packed layout for this dtype on this CPU.
    """
    reason = registry.unsupported("cpp", weight.device.type, weight.dtype)
    if reason is not None:
        raise ValueError(f"pack_weight: {reason}")
    pack = torch.ops.lorasp.pack_weight_cpp
    return PackedWeight(pack(weight.detach(), False), pack(weight.detach(), True))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    mask_A: Tensor | None = None,
    mask_B: Tensor | None = None,
    plan: str = "auto",
    packed: PackedWeight | None = None,
) -> Tensor:
    """y = x W^T + bias + s (D o x) A^T B^T, frozen product and low-rank update in one operator.

    x (..., K), weight (N, K), bias (N,), lora_A (R, K), lora_B (N, R) -> y (..., N), any R >= 1, any leading shape,
    any strides. D keeps an element of x with probability 1 - t/65536, t = round(65536 dropout_p), and rescales it by
    65536/(65536 - t); it is regenerated in backward from `seed` (int or 0-d int64 tensor; None draws one from torch's
    generator), never stored. scale: s, in PEFT lora_alpha / r.

    dtypes: x, weight and bias in one of float64 (reference backend), float32, bfloat16, float16; lora_A and lora_B in
    the same or in float32 (masters; their gradients stay float32). Under autocast it computes what
    torch.nn.functional.linear computes, and saves the uncast x and weight.

    Gradients flow to whatever requires them. Backward keeps x only if lora_A or weight trains and x A^T (M, R) only if
    lora_B trains (LoRA-FA: freeze lora_A). mask_A (R, K), mask_B (N, R), bool: False entries receive exactly zero
    gradient. plan forces how the backend orders the work (addmm, fused, onepass); packed: see pack_weight.

    Raises TypeError and ValueError for arguments that do not fit, RuntimeError for second derivatives.
    Source: LoRA arXiv 2106.09685 eq. 3; LoRA-FA arXiv 2308.03303 section 3.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"lora_linear: x must be a Tensor, got {type(x).__name__}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"lora_linear: x must be (..., K) with K >= 1, got {tuple(x.shape)}")
    dtype, inputs, low_rank = compute_dtypes("lora_linear", x, autocast_dtype(x))
    device, k = x.device, x.shape[-1]
    check_tensor("lora_linear", "weight", weight, (-1, k), "(N, {1})", inputs, device)
    n = weight.shape[0]
    check_tensor("lora_linear", "lora_A", lora_A, (-1, k), "(R, {1}) with R >= 1", low_rank, device)
    r = lora_A.shape[0]
    check_tensor("lora_linear", "lora_B", lora_B, (n, r), "({0}, {1})", low_rank, device)
    if bias is not None:
        check_tensor("lora_linear", "bias", bias, (n,), "({0},)", inputs, device)
    if mask_A is not None:
        check_tensor("lora_linear", "mask_A", mask_A, (r, k), "({0}, {1})", (torch.bool,), device)
    if mask_B is not None:
        check_tensor("lora_linear", "mask_B", mask_B, (n, r), "({0}, {1})", (torch.bool,), device)
    if not isinstance(scale, int | float) or not -math.inf < scale < math.inf:
        raise ValueError(f"lora_linear: scale must be a finite number, got {scale!r}")
    check_dropout("lora_linear", dropout_p)
    if plan not in registry.PLANS:
        raise ValueError(f"lora_linear: plan must be one of {', '.join(registry.PLANS)}, got {plan!r}")
    how = constants(x, weight, scale, dropout_p, plan)
    return LoRALinearFunction.apply(
        x, weight, bias, factor(lora_A, dtype), factor(lora_B, dtype), mask_A, mask_B,
        seed_tensor("lora_linear", seed, device) if how.dropout_p else None, *(packed or (None, None)), how.scale,
        how.dropout_p, 0, dtype, how.backend, how.plan,
    )  # fmt: skip


class Constants(NamedTuple):
    """What LoRALinearFunction takes besides tensors."""

    scale: float
    dropout_p: float
    dtype: torch.dtype
    backend: str
    plan: str


def constants(x: Tensor, weight: Tensor, scale: float, dropout_p: float, plan: str) -> Constants:
    """Everything about a call that is no tensor, from arguments that were checked."""
    dtype = autocast_dtype(x) or x.dtype
    backend, plan = registry.choose_linear("lora_linear", x, weight.shape[0], dtype, plan)
    return Constants(float(scale), effective_rate(dropout_p), dtype, backend, plan)

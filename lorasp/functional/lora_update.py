"""lora_update: validate, choose a backend, call the operator."""

import math

import torch
from torch import Tensor

from lorasp.functional.arguments import autocast_dtype, check_dropout, check_tensor, compute_dtypes, factor, seed_tensor
from lorasp.ops import registry
from lorasp.ops.lora_update import LoRAUpdateFunction


def lora_update(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y += s (D o x) A^T B^T, in place: the low-rank update onto a product of x that was made elsewhere. Returns y.

    y (..., N), x (..., K) with the same leading dimensions, lora_A (R, K), lora_B (N, R), any R >= 1, any strides. D,
    scale and seed as in lora_linear: the same seed gives the same mask.

    It computes in y's dtype: float64 (reference backend), float32, bfloat16 or float16. x has that dtype; under
    autocast any float32, bfloat16 or float16, cast to y's (autocast chose y's dtype when it made y, or y's maker did).
    lora_A and lora_B have y's dtype or are float32 masters, whose gradients stay float32.

    Gradients flow to x, lora_A, lora_B and through y unchanged. Backward keeps x only if lora_A trains and x A^T (M, R)
    only if lora_B trains. As with any in-place operation, y must be no leaf that requires grad, and whoever made it
    must not need its old value for its own backward (linear layers do not).

    Raises TypeError and ValueError for arguments that do not fit, RuntimeError for second derivatives.
    Source: LoRA arXiv 2106.09685 eq. 3; LoRA-FA arXiv 2308.03303 section 3.
    """
    for name, tensor, width in (("y", y, "N"), ("x", x, "K")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"lora_update: {name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.ndim == 0 or tensor.shape[-1] == 0:
            raise ValueError(f"lora_update: {name} must be (..., {width}) with {width} >= 1, got {tuple(tensor.shape)}")
    # What autocast allows is asked of y: the update follows the product, whatever autocast would have made of x.
    autocast = autocast_dtype(y)
    dtype, inputs, low_rank = compute_dtypes("lora_update", y, None if autocast is None else y.dtype, name="y")
    device, k, n = y.device, x.shape[-1], y.shape[-1]
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"lora_update: y must be {(*x.shape[:-1], 'N')} like x, got {tuple(y.shape)}")
    if x.dtype not in inputs:
        raise TypeError(f"lora_update: x must be {' or '.join(map(str, inputs))} like y, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"lora_update: x must be on {device} like y, got {x.device}")
    check_tensor("lora_update", "lora_A", lora_A, (-1, k), "(R, {1}) with R >= 1", low_rank, device)
    check_tensor("lora_update", "lora_B", lora_B, (n, lora_A.shape[0]), "({0}, {1})", low_rank, device)
    if not isinstance(scale, int | float) or not -math.inf < scale < math.inf:
        raise ValueError(f"lora_update: scale must be a finite number, got {scale!r}")
    _check_writable(y, (x, lora_A, lora_B))
    dropping = check_dropout("lora_update", dropout_p)
    return LoRAUpdateFunction.apply(
        y, x, factor(lora_A, dtype), factor(lora_B, dtype),
        seed_tensor("lora_update", seed, device) if dropping else None, float(scale),
        float(dropout_p) if dropping else 0.0, 0,
        registry.choose_linear("lora_update", x, y.shape[-1], dtype)[0],
    )  # fmt: skip


def _check_writable(y: Tensor, others: tuple[Tensor, ...]) -> None:
    if y.is_leaf and y.requires_grad and torch.is_grad_enabled():
        raise ValueError("lora_update: y must not be a leaf that requires grad: it is written to in place")
    if any(size > 1 and stride == 0 for size, stride in zip(y.shape, y.stride(), strict=True)):
        raise ValueError(f"lora_update: y must not overlap itself, got strides {y.stride()} (expanded): clone it first")
    # Memory is not to be seen in a trace, where in-place operations are taken apart anyway.
    if not torch.compiler.is_compiling() and any(torch._C._overlaps(y, other) for other in others):
        raise ValueError("lora_update: y must not share memory with x, lora_A or lora_B: it is written to in place")

"""hidden_cut on Triton: launchers with the semantics of the operator's raw ops.

    y = residual + D∘x          dx = D∘dy

One elementwise kernel: backward is the forward of dy without a residual. Bytes: x, residual and y once each (x of a
dropped token not at all), the mask never.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .launch import Launch, check_operand, device_of, per_shape, with_unit_stride
from .tuning import ceil_div, next_power_of_two

_PURPOSE = tl.constexpr(2)
_TILE = 2048  # elements of a program: 16 of each of its 128 threads


@triton.jit
def _hidden_cut_kernel(
    x_ptr, residual_ptr, out_ptr, seed_ptr, rows, S, F, stride_xb, stride_xs, stride_rb, stride_rs, threshold, rescale,
    length, places, PATTERN: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """A tile of out (rows, F), rows being (b, s); places: positions that a span of `length` tokens can start at."""
    tiles = tl.cdiv(F, BLOCK_F)
    pid = tl.program_id(0).to(tl.int64)
    start_f = pid % tiles * BLOCK_F
    offs_m = pid // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_f = start_f + tl.arange(0, BLOCK_F)
    inside = (offs_m < rows)[:, None] & (offs_f < F)[None, :]
    b, s = offs_m // S, offs_m % S
    seed = tl.load(seed_ptr)
    wanted = inside
    if PATTERN == "column":
        bits = philox._keep_byte(seed, offs_m // 8, _PURPOSE, 0, threshold) >> (offs_m % 8).to(tl.int32)
        wanted = inside & ((bits & 1) != 0)[:, None]
    if PATTERN == "span":
        low, high = b.to(tl.uint32), (b >> 32).to(tl.uint32)
        word, _, _, _ = tl.philox(seed, low, high, low * 0 + _PURPOSE, low * 0, n_rounds=7)
        start = word.to(tl.int64) % places
        wanted = inside & ((s < start) | (s >= start + length))[:, None]
    x = tl.load(x_ptr + (b * stride_xb + s * stride_xs)[:, None] + offs_f[None, :], mask=wanted, other=0.0)
    y = x.to(tl.float32)
    if PATTERN == "element":
        keep = philox.keep_mask(seed, offs_m, start_f, F, threshold, 0, BLOCK_F, ALIGNED, _PURPOSE)
        y = tl.where(keep, y * rescale, 0.0)
    if HAS_RESIDUAL:
        offs_r = (b * stride_rb + s * stride_rs)[:, None] + offs_f[None, :]
        y += tl.load(residual_ptr + offs_r, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_m[:, None] * F + offs_f[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


def forward(x: Tensor, residual: Tensor | None, seed: Tensor, p: float, pattern: str) -> Tensor:
    """y (B, S, F), contiguous, in the dtype of x + residual. x, residual fp32, bf16 or fp16, any strides.

    Raises ValueError for a dtype or a device that the kernel does not take.
    """
    check_operand("hidden_cut", "x", x)
    if residual is not None:
        check_operand("hidden_cut", "residual", residual)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return _cut(x, residual, seed, p, pattern, dtype)


def backward(dy: Tensor, seed: Tensor, p: float, pattern: str, dtype: torch.dtype) -> Tensor:
    """dx (B, S, F), contiguous, in dtype. Raises ValueError as forward does."""
    check_operand("hidden_cut", "dy", dy)
    return _cut(dy, None, seed, p, pattern, dtype)


def _cut(x, residual, seed, p, pattern, dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = with_unit_stride(x)
    residual = None if residual is None else with_unit_stride(residual)
    run = _launch(
        tuple(x.shape), x.stride(), None if residual is None else residual.stride(), p, pattern,
        x.is_contiguous() and (residual is None or residual.is_contiguous()),
    )  # fmt: skip
    with device_of(x):
        run(x, residual, out, seed)
    return out


@per_shape
def _launch(shape, strides, residual_strides, p, pattern, contiguous) -> Launch:
    """(x, residual, out, seed); contiguous: x and residual."""
    B, S, F = shape
    length = philox.span_length(p, S)
    places = S - length + 1
    flat = pattern == "element" and contiguous
    if flat:  # one row: every tile starts at a multiple of eight elements
        B, S, F = 1, 1, B * S * F
        strides, residual_strides = (F, F, 1), residual_strides and (F, F, 1)
    block_f = min(_TILE, max(16, next_power_of_two(F)))
    block_m = min(_TILE // block_f, next_power_of_two(B * S))
    t = round(p * 65536)
    arguments = {
        "rows": B * S, "S": S, "F": F, "stride_xb": strides[0], "stride_xs": strides[1],
        "stride_rb": residual_strides[0] if residual_strides else 0,
        "stride_rs": residual_strides[1] if residual_strides else 0, "threshold": t,
        "rescale": 65536.0 / max(65536 - t, 1), "length": length, "places": places, "PATTERN": pattern,
        "HAS_RESIDUAL": residual_strides is not None, "ALIGNED": flat or F % 8 == 0, "BLOCK_M": block_m,
        "BLOCK_F": block_f,
    }  # fmt: skip
    grid = (ceil_div(B * S, block_m) * ceil_div(F, block_f),)
    free = ("x_ptr", "residual_ptr", "out_ptr", "seed_ptr")
    return Launch(_hidden_cut_kernel, grid, arguments, free, num_warps=4, num_stages=1)

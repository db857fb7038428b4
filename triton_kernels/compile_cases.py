"""The kernel variants meant for an architecture, recorded from the launchers themselves and compiled without a GPU."""

import contextlib
import itertools
from collections.abc import Iterator

import torch

from . import consistency, dropkey_attention, hidden_cut, lora_linear, lora_linear_group, partial_adamw, tuning
from .launch import CompileCase, record

ARCHITECTURES = (80, 90, 100, 120)

_TRAINING = (8192, 4096, 4096, 16)
_WIDE_RANK = (8192, 4096, 4096, 64)
_DECODING = (32, 4096, 4096, 16)
_ONES = (1, 1, 1, 1)  # every size and stride becomes a compile-time constant
_ODD = (1000, 4099, 4099, 24)  # suits neither vector loads nor tensor descriptors
# fp16 runs bf16's code on other instructions of the same shape: one shape stands for it.
_STEPS = (
    *itertools.product((torch.bfloat16,), (_TRAINING, _WIDE_RANK, _DECODING, _ODD, _ONES), ("ieee",)),
    *itertools.product((torch.float16,), (_TRAINING,), ("ieee",)),
    *itertools.product((torch.float32,), (_WIDE_RANK, _ODD), ("ieee",)),
    *itertools.product((torch.float32,), (_TRAINING,), ("tf32",)),
)
# Tiles and code are mostly those of sm_90: what is left to see is whether an architecture's registers hold them.
_OTHER_STEPS = (
    *itertools.product((torch.bfloat16,), (_TRAINING, _WIDE_RANK, _ODD), ("ieee",)),
    *itertools.product((torch.float32,), (_WIDE_RANK, _ODD), ("ieee",)),
)
# (M, K, members' N, members' R), dropout: all of them for a selection of features, plan fused.
_GROUP_STEPS = (
    ((8192, 4096, (4096, 4096, 4096), (16, 16, 16)), 0.0),
    ((8192, 4096, (4096, 4096, 4096), (16, 16, 16)), 0.1),
    ((1000, 4099, (4099, 4099), (24, 24)), 0.0),
)
# (dtype, head dimension, pattern, mask): key lists with a bias meet every kernel, and the least registers to spare.
_ATTENTION_STEPS = {
    80: ((torch.bfloat16, 128, "column", "bias"),),
    90: ((torch.bfloat16, 128, "column", "bias"), (torch.bfloat16, 128, "column", "padding")),
    100: ((torch.bfloat16, 64, "column", "bias"),),
    120: ((torch.float32, 64, "column", "bias"), (torch.float16, 64, "element", "bias")),
}

_EVEN_TOKENS, _ODD_TOKENS = (4, 2048, 4096), (3, 33, 5001)  # (B, S, F) of hidden_cut, (B, T, V) of consistency
_CUT_STEPS = (
    (torch.bfloat16, _EVEN_TOKENS, "element"),
    (torch.float32, _ODD_TOKENS, "element"),
    (torch.bfloat16, _EVEN_TOKENS, "column"),
    (torch.bfloat16, _ODD_TOKENS, "span"),
)
_PAIR_STEPS = ((torch.bfloat16, _EVEN_TOKENS, "kl"), (torch.float32, _ODD_TOKENS, "js"))


def compile_cases(arch: int) -> list[CompileCase]:
    """The distinct specialisations that are launched on `arch`: of lora_linear with every plan, dtype, dropout on and
    off, of the others some that stand for the rest."""
    with record(tuning.target_of_arch(arch)) as cases:
        steps = _STEPS if arch == 90 else _OTHER_STEPS
        for (dtype, shape, precision), plan, dropout_p in itertools.product(steps, tuning.PLANS[1:], (0.0, 0.1)):
            with _matmul_precision(precision):
                _step(dtype, shape, plan, dropout_p)
        for shape, dropout_p in _GROUP_STEPS:
            _group_step(torch.bfloat16, shape, "fused", dropout_p)
        for step in _ATTENTION_STEPS[arch]:
            _attention_step(*step)
        _adamw_step()
        for step in _CUT_STEPS:
            _cut_step(*step)
        for step in _PAIR_STEPS:
            _pair_step(*step)
    return cases


def _step(dtype: torch.dtype, shape: tuple[int, int, int, int], plan: str, dropout_p: float) -> None:
    """One forward and backward on meta tensors; masks where there is dropout, to meet both reductions."""
    M, K, N, R = shape

    def meta(*sizes, kind=dtype):
        return torch.empty(sizes, dtype=kind, device="meta")

    x, weight, lora_A, lora_B, bias = meta(M, K), meta(N, K), meta(R, K), meta(N, R), meta(N)
    mask_A, mask_B = (meta(R, K, kind=torch.bool), meta(N, R, kind=torch.bool)) if dropout_p else (None, None)
    seed = meta(kind=torch.int64)
    _, xa = lora_linear.forward(x, weight, bias, lora_A, lora_B, seed, 1.0, dropout_p, 0, plan)
    lora_linear.backward(
        meta(M, N), x, weight, lora_A, lora_B, xa, seed, mask_A, mask_B, 1.0, dropout_p, 0, True, True, True, plan
    )


def _group_step(dtype: torch.dtype, shape: tuple, plan: str, dropout_p: float) -> None:
    """One forward and backward of a group that trains on half of its features, on meta tensors."""
    M, K, widths, ranks = shape
    nothing, needed = [None] * len(ranks), [True] * len(ranks)

    def meta(*sizes, kind=dtype):
        return torch.empty(sizes, dtype=kind, device="meta")

    x, weights, seed = meta(M, K), [meta(N, K) for N in widths], meta(kind=torch.int64)
    columns, rows = meta(K // 2, kind=torch.int64), [meta(N // 2, kind=torch.int64) for N in widths]
    factors = (
        [meta(R, K // 2) for R in ranks],
        [meta(N // 2, R) for N, R in zip(widths, ranks, strict=True)],
        [meta(R, K) for R in ranks],
        nothing,
        columns,
        rows,
        nothing,
        nothing,
    )
    scalars = ([1.0] * len(ranks), dropout_p, list(range(len(ranks))))
    _, xas, x_columns = lora_linear_group.forward(x, weights, nothing, *factors, seed, *scalars, True, plan)
    lora_linear_group.backward(
        [meta(M, N) for N in widths], None, x_columns, weights, *factors, xas, seed, nothing, nothing, *scalars, K,
        True, needed, needed, plan,
    )  # fmt: skip


def _attention_step(dtype: torch.dtype, D: int, pattern: str, mask: str) -> None:
    """One causal forward and backward on meta tensors; mask: a bias that takes a gradient, or key padding."""
    B, H, S = 2, 16, 2048

    def meta(*sizes, kind=dtype):
        return torch.empty(sizes, dtype=kind, device="meta")

    q, k, v, do = (meta(B, S, H, D).transpose(1, 2) for _ in range(4))
    attn_mask = meta(1, H, S, S) if mask == "bias" else meta(B, 1, 1, S, kind=torch.bool)
    arguments = attn_mask, meta(kind=torch.int64), 0.1, pattern, True, D**-0.5
    o, lse = dropkey_attention.forward(q, k, v, *arguments)
    dropkey_attention.backward(do, q, k, v, o, lse, *arguments, True, True, True, mask == "bias")


def _adamw_step() -> None:
    """Single entries of an fp32 parameter, rows of a bf16 one, all of another, on meta tensors."""
    P, Q = 1000, 4096
    for dtype, shape in ((torch.float32, (P, Q)), (torch.bfloat16, (P, 1)), (torch.bfloat16, None)):
        tensors = ([torch.empty(P, Q, dtype=dtype, device="meta")] for _ in range(4))
        steps = torch.empty(shape or (1,), dtype=torch.int32, device="meta")
        active = None if shape is None else torch.empty(shape, dtype=torch.bool, device="meta")
        partial_adamw.step_(*tensors, [steps], [active], 1e-3, 0.9, 0.999, 1e-8, 0.01)


def _cut_step(dtype: torch.dtype, shape: tuple[int, int, int], pattern: str) -> None:
    """A residual add of an autocast model, and backward; x strided, so that rows are seen as rows."""
    x = torch.empty((shape[1], shape[0], shape[2]), dtype=dtype, device="meta").transpose(0, 1)
    residual = torch.empty(shape, dtype=torch.float32, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta")
    y = hidden_cut.forward(x, residual, seed, 0.1, pattern)
    hidden_cut.backward(y, seed, 0.1, pattern, dtype)


def _pair_step(dtype: torch.dtype, shape: tuple[int, int, int], kind: str) -> None:
    """Both gradients, masked rows with kl."""
    logits, other = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))
    mask = torch.empty(shape[:2], dtype=torch.bool, device="meta") if kind == "kl" else None
    rows, stats = consistency.forward(logits, other, mask, kind)
    consistency.backward(rows, logits, other, stats, mask, kind, True, True)


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """What torch allows for fp32 products on CUDA inside the block."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before

"""The kernel variants meant for an architecture, recorded from the launchers themselves and compiled without a GPU."""

import contextlib
import itertools
from collections.abc import Iterator

import torch

from . import lora_linear, tuning
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


def compile_cases(arch: int) -> list[CompileCase]:
    """The distinct specialisations that lora_linear launches on `arch`, with every plan, dtype, dropout on and off."""
    with record(tuning.target_of_arch(arch)) as cases:
        for (dtype, shape, precision), plan, dropout_p in itertools.product(_STEPS, tuning.PLANS[1:], (0.0, 0.1)):
            with _matmul_precision(precision):
                _step(dtype, shape, plan, dropout_p)
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


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """What torch allows for fp32 products on CUDA inside the block."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before

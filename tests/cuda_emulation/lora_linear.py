"""lora_linear's CUDA kernels on the emulator: each launcher of csrc/cuda/lora_linear_launch.cuh as a function."""

import ctypes
from ctypes import c_bool, c_float, c_int, c_int64, c_uint32
from dataclasses import dataclass, field

import torch
from cuda_emulation.library import DTYPES, call, load, pointer
from torch import Tensor

from lorasp import rng


class Operand(ctypes.Structure):
    """A matrix with unit column stride."""

    _fields_ = (("data", ctypes.c_void_p), ("rows", c_int64), ("cols", c_int64), ("stride", c_int64))

    @classmethod
    def of(cls, matrix: Tensor) -> "Operand":
        assert matrix.stride(1) == 1 or matrix.shape[1] == 1
        return cls(pointer(matrix), *matrix.shape, matrix.stride(0))


@dataclass(frozen=True)
class Dropout:
    seed: Tensor | None = None
    p: float = 0.0
    member: int = 0

    def arguments(self) -> tuple:
        return pointer(self.seed), c_uint32(rng.threshold(self.p)), c_uint32(self.member)


NO_DROPOUT = Dropout()


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@dataclass(frozen=True)
class Kernels:
    """sm_count decides how sums are split; order: of blocks and threads, 0 ascending, 1 descending, else shuffled."""

    sm_count: int = 4
    order: int = 0
    library: ctypes.CDLL = field(default_factory=lambda: load("kernels", torch_too=True))

    def _call(self, name: str, dtype: torch.dtype, *arguments) -> None:
        self.library.emulated_set_order(ctypes.c_uint64(self.order))
        call(getattr(self.library, name), c_int(DTYPES[dtype]), c_int(self.sm_count), *arguments)

    def project(self, p: Tensor, q: Tensor, rank_first: bool, scale: float, dropout: Dropout = NO_DROPOUT) -> Tensor:
        """h = scale (keep o p) q."""
        R = q.shape[0 if rank_first else 1]
        h = poisoned(p.shape[0], R, dtype=p.dtype)
        self._call(
            "emulated_project", p.dtype, Operand.of(p), Operand.of(q), c_bool(rank_first), c_int64(R), c_float(scale),
            *dropout.arguments(), pointer(h),
        )  # fmt: skip
        return h

    def outer(
        self, p: Tensor, h: Tensor, rank_first: bool, mask: Tensor | None, dtype: torch.dtype,
        dropout: Dropout = NO_DROPOUT,
    ) -> Tensor:  # fmt: skip
        """(keep o p)^T h where mask."""
        shape = (h.shape[1], p.shape[1]) if rank_first else (p.shape[1], h.shape[1])
        out = poisoned(*shape, dtype=dtype)
        self._call(
            "emulated_outer", p.dtype, Operand.of(p), Operand.of(h), c_bool(rank_first), *dropout.arguments(),
            pointer(mask), c_int(DTYPES[dtype]), pointer(out),
        )  # fmt: skip
        return out

    def project_outer(
        self, dy: Tensor, lora_B: Tensor, xa: Tensor, scale: float, mask: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """g = scale dy B and dB = dy^T xa where mask, from one pass over dy."""
        g, dB = poisoned(*xa.shape, dtype=dy.dtype), poisoned(*lora_B.shape, dtype=dtype)
        self._call(
            "emulated_project_outer", dy.dtype, Operand.of(dy), Operand.of(lora_B), Operand.of(xa), c_float(scale),
            pointer(mask), pointer(g), c_int(DTYPES[dtype]), pointer(dB),
        )  # fmt: skip
        return g, dB

    def accumulate(
        self, h: Tensor, q: Tensor, rank_first: bool, out: Tensor, bias: Tensor | None = None,
        dropout: Dropout = NO_DROPOUT,
    ) -> None:  # fmt: skip
        """out += keep o (h q) + bias, in place."""
        self._call(
            "emulated_accumulate", out.dtype, Operand.of(h), Operand.of(q), c_bool(rank_first), *dropout.arguments(),
            pointer(bias), Operand.of(out),
        )  # fmt: skip

    def one_pass_over_dy(self, dtype: torch.dtype, M: int, N: int, R: int) -> bool:
        self.library.emulated_one_pass_over_dy.restype = c_bool
        return self.library.emulated_one_pass_over_dy(c_int(DTYPES[dtype]), c_int64(M), c_int64(N), c_int64(R))

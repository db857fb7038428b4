"""The linear operators' CUDA kernels on the emulator: each launcher of csrc/cuda/lora_linear_launch.h as a function."""

import ctypes
from collections.abc import Sequence
from ctypes import c_bool, c_float, c_int, c_int64, c_uint32, c_void_p
from dataclasses import dataclass, field

import torch
from cuda_emulation.library import DTYPES, call, load, pointer
from torch import Tensor

from lorasp import rng

TRAINS = {"whole": 0, "columns": 1, "rows": 2, "entries": 3}


class Operand(ctypes.Structure):
    """A matrix with unit column stride."""

    _fields_ = (("data", c_void_p), ("rows", c_int64), ("cols", c_int64), ("stride", c_int64))

    @classmethod
    def of(cls, matrix: Tensor) -> "Operand":
        assert matrix.stride(1) == 1 or matrix.shape[1] == 1
        return cls(pointer(matrix), *matrix.shape, matrix.stride(0))


class Member(ctypes.Structure):
    """One member's operands and results; what a launcher does not use stays zero."""

    _fields_ = (
        ("q", Operand), ("h", Operand), ("R", c_int64), ("scale", c_float), ("word", c_uint32), ("out", c_void_p),
        ("out_stride", c_int64),
    )  # fmt: skip


class Place(ctypes.Structure):
    """Where a gradient stands."""

    _fields_ = (
        ("out", c_void_p), ("size", c_int64), ("fp32", c_bool), ("mask", c_void_p), ("entries", c_void_p),
        ("entry_count", c_int64), ("position", c_void_p), ("extent", c_int64),
    )  # fmt: skip

    @classmethod
    def of(
        cls, out: Tensor | None, mask: Tensor | None = None, entries: Tensor | None = None,
        position: Tensor | None = None,
    ) -> "Place":  # fmt: skip
        return cls(
            pointer(out), 0 if out is None else out.numel(), out is not None and out.dtype == torch.float32,
            pointer(mask), pointer(entries), 0 if entries is None else len(entries), pointer(position),
            0 if position is None else len(position),
        )  # fmt: skip


class Chosen(ctypes.Structure):
    """Some columns of p: the position of each among them, negative for none."""

    _fields_ = (("position", c_void_p), ("count", c_int64))

    @classmethod
    def of(cls, position: Tensor | None) -> "Chosen":
        return cls(pointer(position), 0 if position is None else int(position.max()) + 1)


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
        return self.project_members(p, [q], rank_first, [scale], [dropout])[0][0]

    def project_members(
        self, p: Tensor, qs: Sequence[Tensor], rank_first: bool, scales: Sequence[float], dropouts: Sequence[Dropout],
        position: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
        """([h_i = scale_i (keep_i o p) q_i], the columns of p that have a position), from one pass over p."""
        ranks = [q.shape[0 if rank_first else 1] for q in qs]
        hs = [poisoned(p.shape[0], R, dtype=p.dtype) for R in ranks]
        columns = None if position is None else poisoned(p.shape[0], int(position.max()) + 1, dtype=p.dtype)
        members = [
            Member(q=Operand.of(q), R=R, scale=scale, word=dropout.member, out=pointer(h), out_stride=R)
            for q, h, R, scale, dropout in zip(qs, hs, ranks, scales, dropouts, strict=True)
        ]
        seed, threshold, _ = dropouts[0].arguments()
        self._call(
            "emulated_project", p.dtype, Operand.of(p), c_int(len(qs)), (Member * len(qs))(*members),
            c_bool(rank_first), seed, threshold, Chosen.of(position), pointer(columns),
        )  # fmt: skip
        return hs, columns

    def outer(
        self, p: Tensor, h: Tensor, rank_first: bool, mask: Tensor | None, dtype: torch.dtype,
        dropout: Dropout = NO_DROPOUT,
    ) -> Tensor:  # fmt: skip
        """(keep o p)^T h where mask."""
        shape = (h.shape[1], p.shape[1]) if rank_first else (p.shape[1], h.shape[1])
        out = poisoned(*shape, dtype=dtype)
        self.outer_members(p, [h], [Place.of(out, mask)], rank_first, [dropout])
        return out

    def outer_members(
        self, p: Tensor, hs: Sequence[Tensor], places: Sequence[Place], rank_first: bool, dropouts: Sequence[Dropout],
        columns: Tensor | None = None, mask_columns: int = 0, position: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Every place receives (keep_i o p)^T h_i, from one pass over p."""
        members = [
            Member(h=Operand.of(h), word=dropout.member) for h, dropout in zip(hs, dropouts, strict=True)
        ]  # fmt: skip
        seed, threshold, _ = dropouts[0].arguments()
        self._call(
            "emulated_outer", p.dtype, Operand.of(p), c_int(len(hs)), (Member * len(hs))(*members),
            (Place * len(hs))(*places), c_bool(rank_first), seed, threshold, pointer(columns), c_int64(mask_columns),
            Chosen.of(position),
        )  # fmt: skip

    def project_outer(
        self, dy: Tensor, lora_B: Tensor, xa: Tensor, scale: float, mask: Tensor | None, dtype: torch.dtype,
        position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """g = scale dy B and dB = dy^T xa where mask, or its rows that have a position, from one pass over dy."""
        N, R = lora_B.shape
        g = poisoned(*xa.shape, dtype=dy.dtype)
        dB = poisoned(N if position is None else int(position.max()) + 1, R, dtype=dtype)
        member = Member(q=Operand.of(lora_B), R=R, scale=scale, out=pointer(g), out_stride=R)
        self._call(
            "emulated_project_outer", dy.dtype, Operand.of(dy), member, Operand.of(xa), Place.of(dB, mask),
            Chosen.of(position),
        )  # fmt: skip
        return g, dB

    def accumulate(
        self, h: Tensor, q: Tensor, rank_first: bool, out: Tensor, bias: Tensor | None = None,
        dropout: Dropout = NO_DROPOUT, add: bool = True,
    ) -> None:  # fmt: skip
        """out = keep o (h q) + bias, with `add` added to what it holds."""
        self.accumulate_members([h], [q], rank_first, out, [dropout], bias, add)

    def accumulate_members(
        self, hs: Sequence[Tensor], qs: Sequence[Tensor], rank_first: bool, out: Tensor, dropouts: Sequence[Dropout],
        bias: Tensor | None = None, add: bool = False,
    ) -> None:  # fmt: skip
        """out = sum of keep_i o (h_i q_i) + bias, with `add` added to what it holds."""
        members = [
            Member(q=Operand.of(q), h=Operand.of(h), word=dropout.member)
            for h, q, dropout in zip(hs, qs, dropouts, strict=True)
        ]
        seed, threshold, _ = dropouts[0].arguments()
        self._call(
            "emulated_accumulate", out.dtype, c_int(len(hs)), (Member * len(hs))(*members), c_bool(rank_first), seed,
            threshold, pointer(bias), c_bool(add), Operand.of(out),
        )  # fmt: skip

    def factor(
        self, trains: str, lora: Tensor, frozen: Tensor | None, index: Tensor | None, shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """The whole factor, from the part that trains and the frozen rest, either in dtype or in fp32."""
        out = poisoned(*shape, dtype=dtype)
        fp32 = [t is not None and t.dtype == torch.float32 for t in (lora, frozen)]
        self.library.emulated_set_order(ctypes.c_uint64(self.order))
        call(
            self.library.emulated_factor, c_int(DTYPES[dtype]), c_int(TRAINS[trains]), pointer(lora),
            c_int64(lora.numel()), c_bool(fp32[0]), pointer(frozen), c_bool(fp32[1]), pointer(index),
            c_int64(0 if index is None else len(index)), *map(c_int64, shape), pointer(out),
        )  # fmt: skip
        return out

    def positions(self, index: Tensor, size: int) -> Tensor:
        position = torch.full((size,), -7, dtype=torch.int32)
        call(self.library.emulated_positions, pointer(index), c_int64(len(index)), c_int64(size), pointer(position))
        return position

    def one_pass_over_dy(self, dtype: torch.dtype, M: int, N: int, R: int, selected: int) -> bool:
        self.library.emulated_one_pass_over_dy.restype = c_bool
        return self.library.emulated_one_pass_over_dy(c_int(DTYPES[dtype]), *map(c_int64, (M, N, R, selected)))

"""lora_linear in CUDA C++: every kernel executed on the CPU by the emulator, against fp64 by the rule."""

import ctypes
import itertools

import pytest
import torch
from cuda_emulation.library import call, load, pointer
from cuda_emulation.lora_linear import NO_DROPOUT, Dropout, Kernels
from cuda_emulation.operands import check, dropped, half_of, normal
from keep_bits import keep_at

from lorasp import rng

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tails of rows and columns, one and several tiles of both; rows at multiples of 16 bytes (136, 64) and not (137, 5).
SIZES = ((129, 137), (1, 136), (260, 64), (33, 5))
RANKS = (1, 3, 8, 24, 48, 80)
SEED = torch.tensor(-987654321987)
DROPOUT = Dropout(SEED, 0.3, member=5)


@pytest.fixture(scope="module")
def kernels():
    return Kernels()


def factor(R, C, rank_first, dtype):
    return normal(*((R, C) if rank_first else (C, R)), dtype=dtype, seed=1)


@pytest.mark.parametrize("dropout", [NO_DROPOUT, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "C"), SIZES)
def test_project(kernels, M, C, dtype, dropout):
    """xa from x and A (rank first), g from dy and B (rank last)."""
    p = normal(M, C, dtype=dtype)
    for number, R in enumerate(RANKS):
        rank_first = number % 2 == 0
        q = factor(R, C, rank_first, dtype)
        h = kernels.project(p, q, rank_first, 1.5, dropout)
        check(h, lambda p, q: 1.5 * p @ (q.t() if rank_first else q), (dropped(p, dropout), q), dtype, f"R={R}")  # noqa: B023


@pytest.mark.parametrize("dropout", [NO_DROPOUT, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "C"), SIZES)
def test_outer(kernels, M, C, dtype, dropout):
    """dA (rank first) from x and g, dB (rank last) from dy and xa; gradients of fp32 masters and of halves; masks."""
    p = normal(M, C, dtype=dtype)
    for number, R in enumerate(RANKS):
        rank_first, out_dtype = number % 2 == 0, dtype if number % 3 else torch.float32
        h = normal(M, R, dtype=dtype, seed=2)
        mask = half_of(*((R, C) if rank_first else (C, R)), seed=R)
        out = kernels.outer(p, h, rank_first, mask, out_dtype, dropout)
        assert out.dtype == out_dtype
        assert out[~mask].count_nonzero() == 0
        kept = mask.double()
        formula = lambda p, h: (h.t() @ p if rank_first else p.t() @ h) * kept.to(p.dtype)  # noqa: B023, E731
        check(out, formula, (dropped(p, dropout), h), dtype, f"R={R}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N"), SIZES)
@pytest.mark.parametrize("R", [1, 8, 16])
def test_project_outer(kernels, M, N, R, dtype):
    dy, lora_B, xa = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate(((M, N), (N, R), (M, R))))
    mask = half_of(N, R)
    g, dB = kernels.project_outer(dy, lora_B, xa, 0.5, mask, torch.float32)
    check(g, lambda dy, b: 0.5 * dy @ b, (dy, lora_B), dtype, "g")
    check(dB, lambda dy, xa: (dy.t() @ xa) * mask, (dy, xa), dtype, "dB")


@pytest.mark.parametrize("dropout", [NO_DROPOUT, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "C"), SIZES)
def test_accumulate(kernels, M, C, dtype, dropout):
    """y += xa B^T + bias (rank last) and dx += D o (g A) (rank first): one rounding of the whole sum."""
    for number, R in enumerate(RANKS):
        rank_first = number % 2 == 0
        h, q = normal(M, R, dtype=dtype), factor(R, C, rank_first, dtype)
        bias = None if rank_first else normal(C, dtype=dtype, seed=3)
        start = normal(M, C, dtype=dtype, seed=4)
        out = start.clone()
        kernels.accumulate(h, q, rank_first, out, bias, dropout)
        extra = torch.zeros(1, dtype=dtype) if bias is None else bias
        formula = lambda h, q, out, bias: out + bias + dropped(h @ (q if rank_first else q.t()), dropout)  # noqa: B023, E731
        check(out, formula, (h, q, start, extra), dtype, f"R={R}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_rows_that_are_strided_or_unaligned(kernels, dtype, offset):
    """The gaps between rows hold NaN and are never used; `offset` moves the rows off the 16-byte grid."""

    def laid(rows, cols, seed):
        wide = torch.full((rows, 168), float("nan"), dtype=dtype)
        view = wide[:, offset : offset + cols]
        view.copy_(normal(rows, cols, dtype=dtype, seed=seed))
        return view

    x, out = laid(70, 136, 0), laid(70, 136, 1)
    A, h, start = normal(8, 136, dtype=dtype), normal(70, 8, dtype=dtype), out.clone()
    check(kernels.project(x, A, True, 1.0), lambda x, a: x @ a.t(), (x, A), dtype)
    check(kernels.outer(x, h, True, None, dtype), lambda x, h: h.t() @ x, (x, h), dtype)
    kernels.accumulate(h, A, True, out)
    check(out, lambda h, a, out: out + h @ a, (h, A, start), dtype)
    assert out.as_strided((70, 168 - 136 - offset), (168, 1), out.storage_offset() + 136)[:-1].isnan().all()


@pytest.mark.parametrize("sm_count", [1, 4, 132])
def test_split_sums_are_the_same_sums(sm_count):
    """More multiprocessors cut a sum into more parts; any count is right."""
    kernels = Kernels(sm_count=sm_count)
    x, A, g = (normal(*s, dtype=torch.bfloat16, seed=i) for i, s in enumerate(((300, 700), (8, 700), (300, 8))))
    check(kernels.project(x, A, True, 1.0), lambda x, a: x @ a.t(), (x, A), torch.bfloat16)
    check(kernels.outer(x, g, True, None, torch.float32), lambda x, g: g.t() @ x, (x, g), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_in_every_order_of_blocks_and_threads(dtype):
    """And bit i of the mask is the definition's, whoever computes it."""
    results = []
    for order in (0, 1, 7):
        kernels = Kernels(order=order)
        x, A, B, h = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate(((140, 200), (3, 200), (200, 3), (140, 3))))
        out = normal(140, 200, dtype=dtype, seed=4)
        kernels.accumulate(h, A, True, out, dropout=DROPOUT)
        results.append(
            (
                kernels.project(x, A, True, 1.0, DROPOUT), kernels.outer(x, h, True, None, torch.float32, DROPOUT),
                *kernels.project_outer(x, B, h, 1.0, None, torch.float32), out,
            )
        )  # fmt: skip
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(("M", "C"), [(40, 64), (9, 37)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_bits_are_the_definition(kernels, M, C, dtype, p):
    """With x = 1, A = 1: D o x itself comes out of outer with h = the identity."""
    ones, eye = torch.ones(M, C, dtype=dtype), torch.eye(M, dtype=dtype)
    for seed, member in ((0, 0), (-1, 1), (2**63 - 1, 2**31 - 1)):
        dropout = Dropout(torch.tensor(seed), p, member)
        kept = kernels.outer(ones, eye, True, None, dtype, dropout)
        assert torch.equal(kept, rng.keep_mask(seed, (M, C), p, rng.PURPOSE_LORA_DROPOUT, member).to(dtype))
        out = torch.zeros(M, C, dtype=dtype)
        kernels.accumulate(eye, ones, True, out, dropout=dropout)
        assert torch.equal(out, kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_nan_does_not_leak(kernels, dtype):
    keep = rng.keep_mask(SEED, (70, 96), 0.3, rng.PURPOSE_LORA_DROPOUT, 5)
    x = torch.where(keep, normal(70, 96, dtype=dtype), torch.nan)
    A, g = normal(4, 96, dtype=dtype), normal(70, 4, dtype=dtype)
    assert kernels.project(x, A, True, 1.0, DROPOUT).isfinite().all()
    assert kernels.outer(x, g, True, None, torch.float32, DROPOUT).isfinite().all()


def test_masked_gradients_are_zero_even_from_nan(kernels):
    x, g, mask = torch.full((40, 24), torch.nan), torch.ones(40, 3), half_of(3, 24)
    out = kernels.outer(x, g, True, mask, torch.float32)
    assert out[~mask].count_nonzero() == 0
    assert out[mask].isnan().all()


@pytest.mark.parametrize("C", [61, 64])
@pytest.mark.parametrize("rank_first", [True, False])
def test_the_last_block_beyond_2_to_36_elements(rank_first, C):
    """Only the last rows are computed, and every row of p and h is the same memory: offsets and counters in 64 bits."""
    M, R, p, seed = 2**31 + 5, 3, 0.5, torch.tensor(9)
    library = load("large")
    x, h, out = (normal(*s, dtype=torch.bfloat16, seed=i) for i, s in enumerate(((1, C), (1, R), (5, C))))
    q, start = factor(R, C, rank_first, torch.bfloat16), out.clone()
    xa, parts = torch.full((5, R), torch.nan).bfloat16(), torch.full((R, C) if rank_first else (C, R), torch.nan)
    call(
        library.large, *map(pointer, (x, h, q)), ctypes.c_bool(rank_first), *map(ctypes.c_int64, (M, C, R)),
        pointer(seed), ctypes.c_uint32(rng.threshold(p)), *map(pointer, (xa, out, parts)),
    )  # fmt: skip

    index = (M - 5 + torch.arange(5))[:, None] * C + torch.arange(C)
    keep = keep_at(index, seed, p)
    right = q.t() if rank_first else q
    check(xa, lambda x, q: torch.where(keep, x, 0) @ q, (x, right), torch.bfloat16, "project")
    check(out, lambda h, q, out: out + torch.where(keep, h @ q.t(), 0), (h, right, start), torch.bfloat16, "accumulate")
    outer = lambda x, h: h.expand(5, R).t() @ torch.where(keep, x, 0)  # noqa: E731
    check(parts if rank_first else parts.t(), outer, (x, h), torch.bfloat16, "outer")


def test_a_long_sum_has_no_more_parts_than_a_grid():
    """Refused by the emulator's launch where one of the three that split their sums forgets the limit."""
    zeros = torch.zeros(65536 * 64 + 1, dtype=torch.bfloat16)
    call(load("large").long_sums, pointer(zeros), *map(ctypes.c_int64, (len(zeros), 2**26)))


def test_one_pass_over_dy_is_a_matter_of_bytes(kernels):
    for dtype, (M, N), R in itertools.product(DTYPES, ((8192, 4096), (64, 4096), (300, 100)), (1, 8, 16, 17, 64)):
        row_blocks = -(-M // (256 if dtype.itemsize == 2 else 128))
        partials = 2 * 4 * row_blocks * N * R  # written, then read
        want = R <= 16 and partials < M * N * dtype.itemsize
        assert kernels.one_pass_over_dy(dtype, M, N, R, N) == want
        assert kernels.one_pass_over_dy(dtype, M, N, R, N // 2) == (R <= 16 and partials < 2 * M * N * dtype.itemsize)

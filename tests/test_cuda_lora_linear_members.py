"""What the linear operators' CUDA kernels do beyond one whole layer, on the emulator, against fp64 by the rule: several
members in one launch, selected columns and rows, single entries, factors in part. Global memory is guarded here, which
whole operators cannot do."""

import pytest
import torch
from cuda_emulation.lora_linear import NO_DROPOUT, Dropout, Kernels, Place, poisoned
from cuda_emulation.operands import check, dropped, normal

from lorasp.reference.lora_linear_group import effective_A, effective_B

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor(-987654321987)


@pytest.fixture(scope="module")
def kernels():
    return Kernels()


def selections(size):
    """Blocks of eight on and off the 16-byte grid, single ones, a ragged end; all; the last alone."""
    scattered = torch.cat(
        (torch.arange(8, 24), torch.tensor([30, 33]), torch.arange(40, 56), torch.arange(size - 3, size))
    )
    return scattered, torch.arange(size), torch.tensor([size - 1])


def stacked(ranks, C, dtype):
    return list(normal(sum(ranks), C, dtype=dtype, seed=1).split(ranks))


def masks(p, count):
    return [Dropout(SEED, p, 7 * i + 1) if p else NO_DROPOUT for i in range(count)]


@pytest.mark.parametrize("ranks", [(3, 8), (16, 16, 16), (1, 40, 2, 8, 5)])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_projects_every_member_and_keeps_columns(kernels, dtype, p, ranks):
    for columns, C in zip(selections(137)[:2], (137, 137), strict=True):
        x, qs, dropouts = normal(130, C, dtype=dtype), stacked(ranks, C, dtype), masks(p, len(ranks))
        position = kernels.positions(columns, C)
        scales = [1.5 + i for i in range(len(ranks))]
        hs, kept = kernels.project_members(x, qs, True, scales, dropouts, position)
        assert torch.equal(kept, x[:, columns])
        for h, q, scale, dropout in zip(hs, qs, scales, dropouts, strict=True):
            check(h, lambda x, q: scale * x @ q.t(), (dropped(x, dropout), q), dtype)  # noqa: B023


@pytest.mark.parametrize("ranks", [(3, 8), (16, 16, 16), (1, 40, 2, 8, 5)])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_over_selected_columns_gives_every_dA(kernels, dtype, p, ranks):
    """Packed, spread over all columns, and single entries; the mask's bits are those of the columns' own places."""
    K = 200
    side_by_side = normal(140, sum(ranks), dtype=dtype, seed=2)
    for columns in selections(K):
        x = normal(140, len(columns), dtype=dtype)
        dropouts, position = masks(p, len(ranks)), kernels.positions(columns, K)
        hs = side_by_side.split(ranks, 1)
        hs = [h.contiguous() for h in hs] if p else hs
        packed = [poisoned(R, len(columns), dtype=(dtype, torch.float32)[i % 2]) for i, R in enumerate(ranks)]
        spread = [poisoned(R, K, dtype=dtype) for R in ranks]
        arguments = (True, dropouts, columns, K)
        kernels.outer_members(x, hs, [Place.of(out) for out in packed], *arguments)
        kernels.outer_members(x, hs, [Place.of(out, position=position) for out in spread], *arguments)
        for out, whole, h, dropout in zip(packed, spread, hs, dropouts, strict=True):
            check(out, lambda x, h: h.t() @ x, (dropped(x, dropout, columns, K), h), dtype)
            assert torch.equal(whole[:, columns], out.to(dtype))
            whole[:, columns] = 0
            assert whole.count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_selected_rows_of_dB(kernels, dtype):
    dy, B, xa = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate(((300, 137), (137, 5), (300, 5))))
    for rows in selections(137):
        position = kernels.positions(rows, 137)
        assert torch.equal(position, torch.full((137,), -1).index_copy(0, rows, torch.arange(len(rows))).int())
        g, dB = kernels.project_outer(dy, B, xa, 2.0, None, torch.float32, position)
        check(g, lambda dy, b: 2.0 * dy @ b, (dy, B), dtype)
        check(dB, lambda dy, xa: dy.t() @ xa, (dy[:, rows], xa), dtype)
        alone, spread = poisoned(len(rows), 5, dtype=dtype), poisoned(137, 5, dtype=dtype)
        for out, place in ((alone, Place.of(alone)), (spread, Place.of(spread, position=position))):
            kernels.outer_members(dy, [xa], [place], False, [NO_DROPOUT], position=position)
            check(out if out is alone else out[rows], lambda dy, xa: dy.t() @ xa, (dy[:, rows], xa), dtype)
        spread[rows] = 0
        assert spread.count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_single_entries_of_a_gradient(kernels, dtype):
    """Of one member's rows among several members' sums."""
    x, gs = normal(140, 70, dtype=dtype), normal(140, 11, dtype=dtype, seed=1).split((5, 6), 1)
    entries = torch.tensor([0, 3, 71, 349])
    first, second = poisoned(4, dtype=dtype), poisoned(4, dtype=torch.float32)
    kernels.outer_members(
        x, gs, [Place.of(first, entries=entries), Place.of(second, entries=entries)], True, [NO_DROPOUT] * 2
    )
    for out, g in ((first, gs[0]), (second, gs[1])):
        check(out, lambda x, g: (g.t() @ x).flatten()[entries], (x, g), dtype)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("ranks", [(3, 8), (16, 40), (1, 33, 2, 8)])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_launch_expands_every_member(kernels, dtype, p, ranks, add):
    for C in (137, 64):
        h, qs, dropouts = normal(140, sum(ranks), dtype=dtype), stacked(ranks, C, dtype), masks(p, len(ranks))
        hs = [part.contiguous() for part in h.split(ranks, 1)] if p else h.split(ranks, 1)
        bias, start = normal(C, dtype=dtype, seed=3), normal(140, C, dtype=dtype, seed=4)
        out = start.clone() if add else poisoned(140, C, dtype=dtype)
        kernels.accumulate_members(hs, qs, True, out, dropouts, bias, add)

        def formula(h, q, bias, start):
            products = [a @ b for a, b in zip(h.split(ranks, 1), q.split(ranks), strict=True)]
            low_rank = sum(dropped(part, dropout) for part, dropout in zip(products, dropouts, strict=True))  # noqa: B023
            return low_rank + bias + (start if add else 0)

        check(out, formula, (h, torch.cat(qs), bias, start), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lora_dtype", [None, torch.float32])
@pytest.mark.parametrize("zeros", [False, True])
def test_factors_are_put_together(kernels, dtype, lora_dtype, zeros):
    """To the bit, from ascending indices; nothing outside of memory is read, whatever an index holds."""
    R, K = 5, 60
    whole, frozen = (normal(R, K, dtype=lora_dtype or dtype, seed=i) for i in range(2))
    frozen = None if zeros else frozen
    base = torch.zeros(R, K).to(whole.dtype) if zeros else frozen
    columns, entries, rows = torch.arange(3, K, 2), torch.arange(0, R * K, 7), torch.tensor([1, 4])
    assert torch.equal(kernels.factor("whole", whole, None, None, (R, K), dtype), whole.to(dtype))
    for trains, index, part, want in (
        ("columns", columns, whole[:, columns], effective_A(whole[:, columns], base, columns, None)),
        ("entries", entries, whole.flatten()[entries], effective_A(whole.flatten()[entries], base, None, entries)),
        ("rows", rows, whole[rows], effective_B(whole[rows], base, rows, None, (R, K))),
    ):
        out = kernels.factor(trains, part.contiguous(), frozen, index, (R, K), dtype)
        assert torch.equal(out, want.to(dtype))
    unordered = torch.tensor([2**62, -5, 17, 17, -(2**62)])
    kernels.factor("columns", whole[:, :5].contiguous(), frozen, unordered, (R, K), dtype)
    position = kernels.positions(unordered, K)
    assert position.ge(-1).all()
    assert position.lt(5).all()


def test_the_same_bits_in_every_order_of_blocks_and_threads():
    results = []
    for order in (0, 1, 7):
        kernels, ranks, dtype = Kernels(order=order), (3, 8, 5), torch.bfloat16
        x, out, qs, dropouts = (
            normal(140, 136, dtype=dtype),
            poisoned(140, 136, dtype=dtype),
            stacked(ranks, 136, dtype),
            masks(0.3, 3),
        )
        position = kernels.positions(torch.arange(8, 40), 136)
        hs, columns = kernels.project_members(x, qs, True, [1.0] * 3, dropouts, position)
        dAs = [poisoned(R, 136, dtype=torch.float32) for R in ranks]
        kernels.outer_members(x, hs, [Place.of(dA) for dA in dAs], True, dropouts)
        kernels.accumulate_members(hs, qs, True, out, dropouts)
        results.append((*hs, columns, *dAs, out))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))

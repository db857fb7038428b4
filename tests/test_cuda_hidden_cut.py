"""hidden_cut in CUDA C++: kernel and operator on the emulator; on hardware: test_gpu_hidden_cut.py."""

import ctypes
from ctypes import c_double, c_int, c_int64

import pytest
import torch
from cuda_emulation.backend import ORDERS
from cuda_emulation.library import DTYPES as NUMBER_OF
from cuda_emulation.library import EmulationError, call, load, pointer
from cuda_emulation.operands import LAYOUTS, normal, padded, shifted
from keep_bits import keep_at

import lorasp
from lorasp import hidden_cut, rng
from lorasp.ops import hidden_cut as ops
from lorasp.ops import registry
from lorasp.reference import hidden_cut as reference
from lorasp.testing import assert_close
from lorasp.testing.hidden_cut import Case, check_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Units of eight elements inside a row, across two rows and across many; a whole block and more.
SHAPES = ((1, 1, 1), (2, 3, 5), (9, 11, 1), (3, 9, 64), (2, 17, 129), (1, 2, 2050))
SEED = torch.tensor(-(2**40) - 17)


class Shape(ctypes.Structure):
    _fields_ = (("B", c_int64), ("S", c_int64), ("F", c_int64))


class Operand(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", c_int), ("stride_b", c_int64), ("stride_s", c_int64))

    @classmethod
    def of(cls, x):
        return cls() if x is None else cls(pointer(x), NUMBER_OF[x.dtype], *x.stride()[:2])


def run(x, residual, p, pattern, dtype, seed=SEED, order=0, faults=()):
    """residual + D o x in dtype, on the emulator, all memory guarded."""
    library = load("hidden_cut", *faults)
    library.emulated_set_order(ctypes.c_uint64(order))
    out = torch.full(x.shape, torch.nan, dtype=dtype)
    call(
        library.emulated_hidden_cut, Shape(*x.shape), Operand.of(x), Operand.of(residual), Operand.of(out),
        c_int(ops.PATTERNS.index(pattern)), c_double(p), pointer(seed),
    )  # fmt: skip
    return out


def assert_right(x, residual, p, pattern, out):
    wide = [None if t is None else t.double() for t in (x, residual)]
    plain, exact = (reference.forward(*pair, SEED, p, pattern) for pair in ((x, residual), wide))
    assert_close(out, plain.to(out.dtype), exact, x.dtype, f"{tuple(x.shape)} {pattern}")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("residual", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(dtype, residual, layout):
    for shape in SHAPES:
        x = layout(normal(*shape, dtype=dtype))
        added = None if residual is None else padded(normal(*shape, dtype=residual, seed=1))
        summed = dtype if added is None else torch.promote_types(dtype, residual)
        for pattern in ops.PATTERNS:
            assert_right(x, added, 0.4, pattern, run(x, added, 0.4, pattern, summed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_backward_is_the_forward_of_dy_in_x_s_dtype(dtype, out):
    for shape in SHAPES[1:4]:
        dy = normal(*shape, dtype=dtype)
        for pattern in ops.PATTERNS:
            dx = run(dy, None, 0.4, pattern, out)
            expected = reference.backward(dy.double(), SEED, 0.4, pattern, torch.float64)
            coarser = max(dtype, out, key=lambda d: torch.finfo(d).eps)
            assert_close(dx, reference.backward(dy, SEED, 0.4, pattern, out), expected, coarser)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("pattern", ops.PATTERNS)
def test_masks_are_the_definition_s_bits(pattern, p, layout):
    for shape in SHAPES:
        for seed in (0, -1, 2**63 - 1):
            ones = layout(torch.ones(shape))
            expected = reference.forward(torch.ones(shape), None, torch.tensor(seed), p, pattern)
            for order in ORDERS:
                assert torch.equal(run(ones, None, p, pattern, torch.float32, torch.tensor(seed), order), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_nan_does_not_leak(dtype):
    for pattern in ops.PATTERNS:
        dropped = run(torch.ones(2, 9, 13), None, 0.5, pattern, torch.float32) == 0
        assert dropped.any()
        x = torch.ones(2, 9, 13, dtype=dtype).masked_fill(dropped, torch.nan)
        assert run(x, torch.ones_like(x), 0.5, pattern, dtype).isfinite().all()


@pytest.mark.parametrize("F", [61, 64])
@pytest.mark.parametrize("pattern", ops.PATTERNS)
def test_the_last_block_beyond_2_to_36_elements(pattern, F):
    """Only the last block runs, and every row is the same memory: offsets and mask counters in 64 bits."""
    S, p = 2**31 + 5, 0.5
    library = load("hidden_cut")
    row, tail = normal(F, dtype=torch.float32), torch.full((2048,), torch.nan)
    count = (S * F - 1) % 2048 + 1
    call(
        library.emulated_hidden_cut_end, Shape(1, S, F), *(Operand(pointer(t), 0, 0, 0) for t in (row, tail)),
        c_int(ops.PATTERNS.index(pattern)), c_double(p), pointer(SEED), c_int64(count),
    )  # fmt: skip
    index = S * F - count + torch.arange(count)
    token, element = index // F, index % F
    if pattern == "span":
        start = rng.span_start(SEED, 1, S, p, rng.PURPOSE_HIDDEN_CUT)
        keep = (token < start) | (token >= start + rng.span_length(p, S))
    else:
        number = index if pattern == "element" else token
        keep = keep_at(number, SEED, p, rng.PURPOSE_HIDDEN_CUT)
    factor = rng.rescale(p) if pattern == "element" else 1.0
    assert torch.equal(tail[:count], torch.where(keep, row[element] * factor, 0))
    assert tail[count:].isnan().all()


def test_division_by_multiplication():
    library = load("hidden_cut")
    edges = [2**k + d for k in range(63) for d in (-1, 0, 1)]
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(0, 2**62, (200,), generator=generator) >> torch.randint(0, 62, (200,), generator=generator)
    numbers = torch.cat((torch.tensor([*edges, 2**63 - 1]), draws))
    for divisor in (d for d in {*edges, 3, 7, 10, 641, 2**61 + 12345, 2**63 - 1} if d > 0):
        quotients, remainders = torch.empty_like(numbers), torch.empty_like(numbers)
        library.emulated_divide(
            c_int64(divisor), pointer(numbers), c_int64(len(numbers)), pointer(quotients), pointer(remainders)
        )
        assert torch.equal(quotients, numbers // divisor), divisor
        assert torch.equal(remainders, numbers % divisor), divisor


FAULTS = {
    "a tail that is not cut": (
        ("hidden_cut.cuh", "const int valid = valid_columns(index, args.count);", "const int valid = kUnit;"),
        "out of bounds",
    ),
    "16 bytes wherever they lie": (
        ("vector.cuh", " && reinterpret_cast<uintptr_t>(p) % 16 == 0;", ";"),
        "reads global memory unaligned",
    ),
    "a row too few": (
        ("hidden_cut.cuh", "if (place.f == 0 && i + 1 < valid) kept", "if (place.f == 1 && i + 1 < valid) kept"),
        None,
    ),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(fault, message):
    def is_right():
        x = shifted(normal(2, 7, 5, dtype=torch.bfloat16))
        out = run(x, None, 0.5, "column", x.dtype, faults=[fault])
        return torch.equal(out, reference.forward(x, None, SEED, 0.5, "column"))

    if message is None:
        assert not is_right()
    else:
        with pytest.raises(EmulationError, match=message):
            is_right()


@pytest.mark.parametrize("residual", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operator(emulated, dtype, residual):
    for shape in SHAPES:
        for pattern in ops.PATTERNS:
            for result in check_case(Case(*shape, dtype, pattern, 0.3, residual), "cuda"):
                assert result.ok, result


def test_operator_takes_any_strides_and_nothing(emulated):
    x = normal(4, 6, 10, dtype=torch.float32)
    views = (*(layout(x) for layout in LAYOUTS.values()), x.transpose(1, 2).contiguous().transpose(1, 2),
             x[:1, :1].expand(4, 6, 10), x[..., :1].expand(4, 6, 10), x[:, ::2], x[..., ::2])  # fmt: skip
    for view in views:
        for pattern in ops.PATTERNS:
            with lorasp.use_backend("cuda"):
                y = hidden_cut(view, 0.4, pattern=pattern, residual=views[0].as_strided(view.shape, (0, 0, 1)), seed=3)
            with lorasp.use_backend("reference"):
                want = hidden_cut(
                    view, 0.4, pattern=pattern, residual=views[0].as_strided(view.shape, (0, 0, 1)), seed=3
                )
            torch.testing.assert_close(y, want)
    with lorasp.use_backend("cuda"):
        for shape in ((0, 3, 5), (2, 0, 5), (2, 3, 0)):
            empty = torch.empty(shape, requires_grad=True)
            y = hidden_cut(empty, 0.5, residual=torch.empty(shape))
            y.sum().backward()
            assert y.shape == empty.grad.shape == shape


@pytest.mark.parametrize("pattern", ops.PATTERNS)
def test_opcheck(emulated, pattern):
    x, residual, seed = torch.randn(2, 3, 5), torch.randn(2, 3, 5).bfloat16(), torch.tensor(3)
    for added in (None, residual):
        torch.library.opcheck(ops.forward_ops["cuda"], (x, added, seed, 0.3, pattern))
    torch.library.opcheck(ops.backward_ops["cuda"], (x, seed, 0.3, pattern, torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "row"}, "pattern must be one of element, column, span, got row"),
        ({"p": 1.0}, r"p must be in \[0, 1\), got 1"),
        ({"p": 1 - 2**-18}, r"p must be in \[0, 1\), got 0.99"),
        ({"x": torch.zeros(2, 3)}, r"x must be \(B, S, F\), got 2 dimensions"),
        ({"residual": torch.zeros(1, 3, 2)}, r"residual must be \(1, 2, 3\), got \(1, 3, 2\)"),
        ({"seed": torch.tensor(1.0)}, "seed must have dtype Long, got Float"),
        ({"x": torch.zeros(1, 2, 3, dtype=torch.float64)}, "x must be float32, bfloat16 or float16"),
        ({"residual": torch.zeros(1, 2, 3, dtype=torch.float64)}, "residual must be float32, bfloat16 or float16"),
    ],
    ids=str,
)
def test_raw_op_refuses(emulated, change, message):
    arguments = {"x": torch.zeros(1, 2, 3), "residual": None, "seed": torch.tensor(1), "p": 0.5, "pattern": "element"}
    with pytest.raises(RuntimeError, match=f"hidden_cut: {message}"):
        torch.ops.lorasp.hidden_cut_fwd_cuda(*(arguments | change).values())


def test_auto_takes_cuda_where_triton_is_not_installed(emulated, monkeypatch):
    monkeypatch.setattr(registry, "_triton_installed", False)
    assert registry.choose("hidden_cut", "cuda", torch.bfloat16) == "cuda"
    monkeypatch.setattr(registry, "_triton_installed", True)
    assert registry.choose("hidden_cut", "cuda", torch.bfloat16) == "triton"

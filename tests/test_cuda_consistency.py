"""consistency in CUDA C++: kernels and operators on the emulator; on hardware: test_gpu_consistency.py."""

import ctypes
from ctypes import c_bool, c_int, c_int64
from dataclasses import dataclass, replace

import pytest
import torch
from cuda_emulation.backend import ORDERS
from cuda_emulation.library import DTYPES as NUMBER_OF
from cuda_emulation.library import EmulationError, call, load, pointer
from cuda_emulation.operands import LAYOUTS, shifted

import lorasp
from lorasp import consistency_loss, testing
from lorasp.ops import consistency as ops
from lorasp.ops import linear_consistency as linear_ops
from lorasp.ops import registry
from lorasp.reference import consistency as reference
from lorasp.testing import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Few rows: the rule then asks for as few roundings as PyTorch happened to need. A fixed draw that is typical.
SEED = 1


class Operand(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride_b", c_int64), ("stride_t", c_int64))

    @classmethod
    def of(cls, x):
        return cls() if x is None else cls(pointer(x), *x.stride()[:2])


@dataclass(frozen=True)
class Kernels:
    """sm_count decides over how many blocks a row is spread; order: of blocks and threads."""

    sm_count: int = 4
    order: int = 0
    faults: tuple = ()

    def _call(self, name, *arguments):
        library = load("consistency", *self.faults)
        library.emulated_set_order(ctypes.c_uint64(self.order))
        call(getattr(library, name), *arguments)

    def forward(self, a, b, mask=None, kind="kl"):
        rows, stats = (torch.full((*a.shape[:2], *size), torch.nan) for size in ((), (ops.STATS,)))
        self._call(
            "emulated_consistency_forward", c_int(NUMBER_OF[a.dtype]), c_int(self.sm_count), *map(c_int64, a.shape),
            Operand.of(a), Operand.of(b), pointer(mask), c_bool(kind == "kl"), pointer(rows), pointer(stats),
        )  # fmt: skip
        return rows, stats

    def backward(self, drows, a, b, stats, mask=None, kind="kl", needs=(True, True), into=None):
        """Gradients, contiguous; into: a and b themselves, which they then replace."""
        out = [torch.full(a.shape, torch.nan, dtype=a.dtype) for _ in needs] if into is None else into
        da, db = (o if need else None for o, need in zip(out, needs, strict=True))
        self._call(
            "emulated_consistency_backward", c_int(NUMBER_OF[a.dtype]), *map(c_int64, a.shape),
            *map(Operand.of, (a, b, da, db)), c_bool(into is not None), pointer(drows), pointer(stats), pointer(mask),
            c_bool(kind == "kl"),
        )  # fmt: skip
        return da, db


def pair(B, T, V, dtype, spread=3.0):
    generator = torch.Generator().manual_seed(SEED)
    logits, noise = torch.randn(2, B, T, V, generator=generator)
    return (logits * spread).to(dtype), (logits * spread + noise).to(dtype)


def assert_right(kernels, a, b, mask, kind, needs=(True, True), into=None):
    """Forward, and backward from the kernels' own stats, by the rule."""
    drows = torch.linspace(-1, 2, mask.numel()).view(mask.shape) if mask is not None else torch.ones(a.shape[:2])
    plain, exact = reference.forward(a, b, mask, kind), reference.forward(a.double(), b.double(), mask, kind)
    plain_grads = reference.backward(drows, a, b, plain[1], mask, kind, *needs)
    exact_grads = reference.backward(drows.double(), a.double(), b.double(), exact[1], mask, kind, *needs)
    dtype = a.dtype
    rows, stats = kernels.forward(a, b, mask, kind)
    assert_close(rows, plain[0], exact[0], dtype, "rows")
    for i in range(4 if kind == "js" else ops.STATS):
        assert_close(stats[..., i], plain[1][..., i], exact[1][..., i], dtype, f"stats {i}")
    grads = kernels.backward(drows, a, b, stats, mask, kind, needs, into)
    for name, need, *tensors in zip(("dlogits", "dother"), needs, grads, plain_grads, exact_grads, strict=True):
        if need:
            assert_close(*tensors, dtype, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 3, 17, 64, 300, 2047, 2049, 5001])
def test_sizes(dtype, V):
    """Rows of a lane, of a warp, of a block, of several; the last two spread over blocks too."""
    a, b = pair(4, 5, V, dtype)
    mask = torch.arange(20).view(4, 5) % 3 > 0
    for kernels in (Kernels(1), Kernels(132, order=7)):
        assert_right(kernels, a, b, None, "kl")
        assert_right(kernels, a, b, mask, "js", (True, False))
        assert_right(kernels, a, b, mask, "kl", (False, True))


@pytest.mark.parametrize("other", LAYOUTS.values(), ids=[f"other {name}" for name in LAYOUTS])
@pytest.mark.parametrize("logits", LAYOUTS.values(), ids=[f"logits {name}" for name in LAYOUTS])
def test_layouts_and_replacement(logits, other):
    for dtype, V in ((torch.float32, 63), (torch.bfloat16, 2061)):
        plain = pair(4, 5, V, dtype)
        a, b = logits(plain[0]), other(plain[1])
        assert_right(Kernels(), a, b, None, "kl")
        into = logits(plain[0].clone()), other(plain[1].clone())
        assert_right(Kernels(), a, b, None, "kl", into=into)
        untouched = other(plain[1].clone())
        assert_right(Kernels(), a, b, None, "kl", (True, False), into=(logits(plain[0].clone()), untouched))
        assert torch.equal(untouched, b)


def test_rows_are_spread_over_blocks_until_the_multiprocessors_are_busy():
    parts = load("consistency").emulated_consistency_parts
    parts.restype = c_int64

    def count(dtype, sm_count, rows, V):
        return parts(c_int(NUMBER_OF[dtype]), c_int(sm_count), c_int64(rows), c_int64(V))

    assert count(torch.bfloat16, 132, 4096, 128_000) == 1
    assert count(torch.bfloat16, 132, 1, 2048) == 1
    assert count(torch.bfloat16, 132, 16, 128_000) == 33
    assert count(torch.bfloat16, 132, 1, 128_000) == 63  # a vector a thread
    assert count(torch.float32, 132, 1, 10_000_000) == 256  # what one block can merge


@pytest.mark.parametrize("sm_count", [1, 132])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_in_every_order_of_blocks_and_threads(dtype, sm_count):
    a, b = pair(1, 2, 5001, dtype)
    results = []
    for order in ORDERS:
        kernels = Kernels(sm_count, order)
        rows, stats = kernels.forward(a, b)
        results.append((rows, stats, *kernels.backward(torch.ones(1, 2), a, b, stats)))
    assert all(map(torch.equal, results[0], other) for other in results[1:])


@pytest.mark.parametrize("sm_count", [1, 132])
@pytest.mark.parametrize("order", ["rising", "falling", "late"])
def test_the_maximum_may_come_late(order, sm_count):
    """The sums follow the maximum, past vectors and parts that hold nothing."""
    a = torch.linspace(-40, 40, 9000).expand(1, 2, 9000).clone()
    a = a.flip(2) if order == "falling" else a
    if order == "late":
        a[..., :6000] = -torch.inf
    b = a + torch.randn(1, 2, 9000, generator=torch.Generator().manual_seed(0))
    assert_right(Kernels(sm_count), a, b, None, "kl")


@pytest.mark.parametrize("sm_count", [1, 132])
@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_entries_out_of_the_vocabulary(lowest, sm_count):
    a, b = pair(2, 8, 3001, torch.float32)
    unused = torch.rand(3001, generator=torch.Generator().manual_seed(0)) < 0.9
    unused[:1500] = True
    a, b = (side.masked_fill(unused, lowest) for side in (a, b))
    assert_right(Kernels(sm_count), a, b, None, "kl")
    assert_right(Kernels(sm_count), a[..., -50:], b[..., -50:], None, "js")


@pytest.mark.parametrize("kind", ops.KINDS)
@pytest.mark.parametrize("V", [40, 2500])
def test_what_is_not_finite_stays_in_its_row(kind, V):
    """A zero of one distribution only, infinities, NaN; the rows between are right."""
    a, b = pair(1, 9, V, torch.float32)
    a[0, 1, 3] = b[0, 3, 5] = -torch.inf
    a[0, 5, V - 1], a[0, 7, 2] = torch.nan, torch.inf
    drows = torch.ones(1, 9)
    rows, stats = Kernels().forward(a, b, None, kind)
    want, want_stats = reference.forward(a, b, None, kind)
    torch.testing.assert_close(rows, want, equal_nan=True)
    wants = reference.backward(drows, a, b, want_stats, None, kind, True, True)
    for have, expected in zip(Kernels().backward(drows, a, b, stats, None, kind), wants, strict=True):
        torch.testing.assert_close(have, expected, equal_nan=True, atol=1e-6, rtol=1e-4)
    assert rows[0, ::2].isfinite().all()


def test_rows_left_out_may_hold_anything():
    for V in (7, 2500):
        a, b = pair(1, 4, V, torch.float32)
        mask = torch.tensor([[True, False, True, False]])
        a[0, 1], b[0, 3] = torch.nan, torch.inf
        for kernels in (Kernels(1), Kernels(132)):
            rows, stats = kernels.forward(a, b, mask)
            grads = kernels.backward(torch.ones(1, 4), a, b, stats, mask)
            for tensor in (rows, stats, *grads):
                assert tensor.isfinite().all()
                assert tensor[0, 1::2].count_nonzero() == 0
                assert tensor[0, ::2].count_nonzero() > 0


def test_the_last_block_beyond_2_to_36_elements():
    """Only the last block runs, and every row is the same memory: rows and offsets in 64 bits."""
    T, V = 2**31 - 1, 61
    vectors = -(-(V + 7) // 8)
    count = T - (T * vectors - 1) // 256 * 256 // vectors  # the first of them is begun by the block before
    a, b = pair(1, 1, V, torch.bfloat16)
    a, b = (side.expand(1, count, V) for side in (a, b))
    _, stats = reference.forward(a, b, None, "kl")
    drows, tail = torch.linspace(1, 2, count)[None], torch.full((1, count, V), torch.nan, dtype=torch.bfloat16)
    call(
        load("consistency").emulated_consistency_end, c_int64(T), c_int64(V),
        *map(pointer, (a, b, drows, stats, tail)), c_int64(count),
    )  # fmt: skip
    want = Kernels().backward(drows, a, b, stats)[0]
    assert count > 2
    assert torch.equal(tail[:, 1:], want[:, 1:])


FAULTS = {
    "a missing barrier": (
        ("consistency.cuh", "  sync_threads();\n  if (warp > 0) return sums;", "  if (warp > 0) return sums;"),
        "is read before anything is written there|without a barrier",
    ),
    "an index one row too far": (
        ("consistency.cuh", "store_global(stats + (row * kStats + i)", "store_global(stats + (row * kStats + i + 1)"),
        "out of bounds|written in the same launch",
    ),
    "a row that begins elsewhere": (
        ("consistency.cuh", "const int from = at < 0 ? past : 0, to = left < kVector<T> ? static_cast<int>(left) : "
         "kVector<T>;\n    Words da{}", "const int from = 0, to = left < kVector<T> ? static_cast<int>(left) : "
         "kVector<T>;\n    Words da{}"),
        "out of bounds|written in the same launch",
    ),
    "a base that moves without its sums": (
        ("consistency.cuh", "if (moved != 0.0f) dot.subtract_multiple(moved, weight);", ""),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(fault, message):
    a, b = pair(1, 2, 2501, torch.float32)
    kernels = Kernels(faults=(fault,))
    if message is None:
        with pytest.raises(AssertionError, match=r"error .* exceeds"):
            assert_right(kernels, shifted(a), shifted(b), None, "kl")
    else:
        with pytest.raises(EmulationError, match=message):
            assert_right(kernels, shifted(a), shifted(b), None, "kl")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 1), (63, 129), (64, 2), (16, 5001)], ids=str)
def test_operator(emulated, shape, dtype):
    for case in testing.consistency.cases([shape], [dtype]):
        for result in testing.consistency.check_case(replace(case, seed=SEED), "cuda"):
            assert result.ok, result


@pytest.mark.parametrize("dtype", DTYPES)
def test_through_the_head_in_chunks(emulated, dtype, monkeypatch):
    monkeypatch.setattr(linear_ops, "LOGITS_BYTES", 8000)
    for case in testing.linear_consistency.cases([(19, 10, 129)], [dtype]):
        for result in testing.linear_consistency.check_case(case, "cuda"):
            assert result.ok, result


def test_operator_takes_any_strides_and_no_rows(emulated):
    logits, other = torch.randn(2, 3, 4, 70)
    views = (*LAYOUTS.values(), lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
             lambda t: t[:1, :1].expand(3, 4, 70))  # fmt: skip
    for view in views:
        sides = [view(side).requires_grad_() for side in (logits, other)]
        results = []
        for backend in ("cuda", "reference"):
            with lorasp.use_backend(backend):
                rows = consistency_loss(*sides, reduction="none")
                results.append((rows, *torch.autograd.grad(rows.sum(), sides)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    with lorasp.use_backend("cuda"):
        empty = torch.empty(0, 4, 70, requires_grad=True)
        consistency_loss(empty, torch.empty(0, 4, 70)).backward()
        assert empty.grad.shape == (0, 4, 70)


@pytest.mark.parametrize("kind", ops.KINDS)
def test_opcheck(emulated, kind):
    logits, other = torch.randn(2, 1, 3, 5)
    for mask in (None, torch.tensor([[True, False, True]])):
        torch.library.opcheck(ops.forward_ops["cuda"], (logits, other, mask, kind))
        _, stats = ops.forward_ops["cuda"](logits, other, mask, kind)
        arguments = torch.ones(1, 3), logits, other, stats, mask, kind, True, False
        torch.library.opcheck(ops.backward_ops["cuda"], arguments)
        torch.library.opcheck(ops.replace_ops["cuda"], arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tv"}, "kind must be one of kl, js, got tv"),
        ({"logits": torch.zeros(2, 3)}, r"logits must be \(B, T, V\), got 2 dimensions"),
        ({"logits": torch.zeros(1, 2, 0)}, r"logits must be \(B, T, V\) with V >= 1 .*, got \(1, 2, 0\)"),
        ({"other": torch.zeros(1, 3, 2)}, r"other must be \(1, 2, 3\), got \(1, 3, 2\)"),
        ({"other": torch.zeros(1, 2, 3).half()}, "other must have dtype Float, got Half"),
        ({"mask": torch.zeros(1, 2)}, "mask must have dtype Bool, got Float"),
        ({"logits": torch.zeros(1, 2, 3).double(), "other": torch.zeros(1, 2, 3).double()}, "logits must be float32"),
    ],
    ids=str,
)
def test_raw_op_refuses(emulated, change, message):
    arguments = {"logits": torch.zeros(1, 2, 3), "other": torch.zeros(1, 2, 3), "mask": None, "kind": "kl"}
    with pytest.raises(RuntimeError, match=f"consistency: {message}"):
        torch.ops.lorasp.consistency_fwd_cuda(*(arguments | change).values())


def test_rows_to_be_replaced_must_have_unit_stride(emulated):
    logits = torch.zeros(1, 3, 2).transpose(1, 2)
    with pytest.raises(RuntimeError, match="consistency: rows to be replaced must have unit stride, got stride 2"):
        ops.replace_ops["cuda"](torch.ones(1, 2), logits, logits, torch.ones(1, 2, 6), None, "kl", True, True)


def test_auto_takes_cuda_where_triton_is_not_installed(emulated, monkeypatch):
    monkeypatch.setattr(registry, "_triton_installed", False)
    assert registry.choose("consistency", "cuda", torch.bfloat16) == "cuda"
    monkeypatch.setattr(registry, "_triton_installed", True)
    assert registry.choose("consistency", "cuda", torch.bfloat16) == "triton"

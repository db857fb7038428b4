"""partial_adamw in CUDA C++: kernels and operator on the emulator; on hardware: test_gpu_partial_adamw.py."""

import ctypes
import functools
from ctypes import c_double, c_int, c_int64, c_void_p

import pytest
import torch
from adamw_steps import ACTIVE_SHAPES, PARTIAL, assert_right, opcheck, run
from cuda_emulation.backend import ORDERS
from cuda_emulation.library import DTYPES as NUMBER_OF
from cuda_emulation.library import EmulationError, call, load, pointer
from many_parameters import assert_many_are_right

from lorasp.ops import registry
from lorasp.ops.partial_adamw import step_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HYPER = (1e-2, 0.9, 0.999, 1e-8, 0.1)


class Operand(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "steps", "active")),
        ("P", c_int64), ("Q", c_int64), ("grain", c_int),
    )  # fmt: skip


def emulated_step(params, grads, exp_avgs, exp_avg_sqs, steps, actives, *hyper, order=0, faults=()):
    """The raw op's step over contiguous 2-d parameters of one dtype, all memory guarded."""
    library = load("partial_adamw", *faults)
    library.emulated_set_order(ctypes.c_uint64(order))
    operands = (Operand * len(params))()
    for i, tensors in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, steps, actives, strict=True)):
        shape, active = params[i].shape, actives[i]
        per_row, per_column = (False, False) if active is None else (n != 1 for n in active.shape)
        operands[i] = Operand(*map(pointer, tensors), *shape, 2 * per_column + per_row)
    call(
        library.emulated_partial_adamw, c_int(NUMBER_OF[params[0].dtype]), operands, c_int64(len(params)),
        *map(c_double, hyper),
    )  # fmt: skip


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "shifted"])
@pytest.mark.parametrize("taken", [0, 2**20])
@pytest.mark.parametrize("kind", ACTIVE_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_step(dtype, kind, taken, shift):
    assert_right(emulated_step, dtype, kind, HYPER, taken=taken, shift=shift)


@pytest.mark.parametrize("kind", PARTIAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_leaks_in_from_where_nothing_is_active(dtype, kind):
    assert all(tensor.isfinite().all() for tensor in run(emulated_step, dtype, kind, HYPER, poison=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_rests_keeps_even_the_bits_of_nan(dtype):
    """Bits, not numbers: neighbours in one vector are written with them."""
    half = dtype.itemsize == 2
    integers, pattern = (torch.int16, 0x7FA5 if half else 0) if half else (torch.int32, 0x7FA00001)
    bits = torch.full((4, 16), pattern, dtype=integers)
    tensors = [bits.clone().view(dtype) for _ in range(3)]
    active = torch.zeros(4, 16, dtype=torch.bool)
    active[:, ::3] = True
    for tensor in tensors:
        tensor[active] = 1.0
    steps = torch.zeros(4, 16, dtype=torch.int32)
    emulated_step(*([t] for t in (tensors[0], torch.ones(4, 16, dtype=dtype), *tensors[1:], steps)), [active], *HYPER)
    for tensor in tensors:
        assert torch.equal(tensor.view(integers)[~active], bits[~active])
        assert tensor[active].isfinite().all()


@pytest.mark.parametrize("order", ORDERS, ids=ORDERS.get)
@pytest.mark.parametrize("count", [1, 36, 37, 80])
def test_many_parameters_share_a_launch(count, order):
    assert_many_are_right(functools.partial(emulated_step, order=order), count, HYPER)


@pytest.mark.parametrize(
    "hyper", [(1e-2, 0.0, 0.0, 1e-8, 0.0), (0.0, 0.9, 0.99, 0.0, 0.5), (1e-3, 0.5, 0.999999, 0.0, 0)]
)
def test_extreme_settings(hyper):
    assert_many_are_right(emulated_step, 12, hyper)


FAULTS = {
    "an index one entry too far": (
        ("partial_adamw.cuh", "store_vector<T>(item.param + index,", "store_vector<T>(item.param + index + 1,"),
        "out of bounds|that another thread writes",
    ),
    "a tail that is not cut": (
        ("partial_adamw.cuh", "left < kVector<T> ? static_cast<int>(left) : kVector<T>;\n  ActiveEntries",
         "kVector<T>;\n  ActiveEntries"),
        "out of bounds",
    ),
    "steps of one count for all": (
        ("partial_adamw.cuh", "if (active.steps[i] != t) {", "if (t == 0) {"),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(fault, message):
    def step(*arguments):
        emulated_step(*arguments, faults=(fault,))

    caught, text = (AssertionError, "error .* exceeds") if message is None else (EmulationError, message)
    with pytest.raises(caught, match=text):
        assert_right(step, torch.float32, "entries", HYPER)


@pytest.mark.parametrize("kind", ACTIVE_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operator(emulated, dtype, kind):
    assert_right(step_ops["cuda"], dtype, kind, HYPER)


def test_operator_takes_parameters_of_any_shape_layout_and_dtype(emulated):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator) for shape in ((), (7,), (3, 4, 5), (0, 3), (200, 3))]
    params += [torch.randn(9, 5, generator=generator).t(), torch.randn(4, 12, generator=generator)[:, ::2]]
    params += [param.to(dtype) for param in params[-2:] for dtype in DTYPES[1:]]
    grads = [torch.randn(param.shape, generator=generator).to(param.dtype) for param in params]
    actives = [None] * len(params)
    actives[6], actives[7] = torch.rand(6, 4).t() < 0.5, torch.rand(5, 1) < 0.5
    results = []
    for backend in ("cuda", "reference"):
        own = [param.clone() for param in params]  # clone() keeps the layout of dense ones
        own[6] = torch.zeros(4, 12)[:, ::2].copy_(params[6])
        moments = [[torch.zeros_like(param) for param in own] for _ in range(2)]
        steps = [torch.zeros(1 if active is None else active.shape, dtype=torch.int32) for active in actives]
        steps[6] = torch.zeros(6, 4, dtype=torch.int32).t()
        step_ops[backend](own, grads, *moments, steps, actives, *HYPER)
        results.append([*own, *moments[0], *moments[1], *steps])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", ACTIVE_SHAPES)
def test_opcheck(emulated, kind):
    opcheck("cuda", kind, HYPER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": [torch.zeros(3, 4).double()]}, r"params\[0\] must be float32, bfloat16 or float16"),
        ({"grads": [torch.zeros(4, 3)]}, r"grads\[0\] must be shaped like its parameter"),
        ({"exp_avgs": [torch.zeros(3, 4).half()]}, r"exp_avgs\[0\] must have dtype Float, got Half"),
        ({"exp_avg_sqs": []}, "must be as many, got 1 and 0"),
        ({"steps": [torch.zeros(3, 4)]}, r"steps\[0\] must have dtype Int, got Float"),
        ({"steps": [torch.zeros(1, dtype=torch.int32)]}, r"steps\[0\] must be shaped like its active"),
        ({"actives": [torch.ones(2, 4, dtype=torch.bool)]}, r"actives\[0\] must be \(1 or 3, 1 or 4\), got \(2, 4\)"),
        ({"actives": [torch.ones(3, 4)]}, r"actives\[0\] must have dtype Bool, got Float"),
        ({"actives": [torch.ones(4, dtype=torch.bool)]}, r"actives\[0\] must be 2-d beside a 2-d parameter, got 1"),
    ],
    ids=str,
)
def test_raw_op_refuses(emulated, change, message):
    arguments = {name: [torch.zeros(3, 4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    arguments |= {"steps": [torch.zeros(3, 4, dtype=torch.int32)], "actives": [torch.ones(3, 4, dtype=torch.bool)]}
    with pytest.raises(RuntimeError, match=f"partial_adamw: .*{message}"):
        step_ops["cuda"](*(arguments | change).values(), *HYPER)


def test_auto_takes_cuda_where_triton_is_not_installed(emulated, monkeypatch):
    monkeypatch.setattr(registry, "_triton_installed", False)
    assert registry.choose("partial_adamw", "cuda", torch.bfloat16) == "cuda"
    monkeypatch.setattr(registry, "_triton_installed", True)
    assert registry.choose("partial_adamw", "cuda", torch.bfloat16) == "triton"

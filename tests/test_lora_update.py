"""lora_update's public function: what it computes, in place, what it saves, how it fails; on the backend of `auto`.

Backend against reference over more shapes: test_cpp_lora_update.py, test_triton_lora_update.py.
"""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear

import lorasp
from lorasp import lora_update, rng, testing
from lorasp.memory import saved_bytes
from lorasp.ops import registry
from lorasp.ops.lora_update import backward_ops, forward_ops
from lorasp.testing.lora_update import Case, make_inputs, run

HALVES = (torch.bfloat16, torch.float16)
CPU_BACKENDS = [
    name for name in ("reference", "cpp", "triton") if registry.unsupported(name, "cpu", torch.float32) is None
]


def factors(dtype=torch.float64, K=7, N=6, R=3):
    inputs = make_inputs(Case(1, K, N, R, dtype))
    return [inputs[name].requires_grad_() for name in ("lora_A", "lora_B")]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_equals_the_formula_and_autograd(p):
    inputs = make_inputs(Case(5, 7, 6, 3, torch.float64))
    keep = rng.keep_mask(9, (5, 7), p, rng.PURPOSE_LORA_DROPOUT)
    made_from, x, A, B = leaves = [inputs[name].requires_grad_() for name in ("y", "x", "lora_A", "lora_B")]
    dropped = torch.where(keep, x, 0) * rng.rescale(p)
    expected = made_from.sin() + 0.7 * linear(linear(dropped, A), B)
    y = made_from.sin()
    assert lora_update(y, x, A, B, scale=0.7, dropout_p=p, seed=9) is y
    torch.testing.assert_close(y, expected)
    gradients = (torch.autograd.grad(out, leaves, inputs["dy"]) for out in (y, expected))
    for have, want in zip(*gradients, strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("lead", [(), (0,), (2, 3)])
def test_gradcheck(lead, p):
    y, x = (torch.randn(*lead, width, dtype=torch.float64, requires_grad=True) for width in (6, 7))
    call = lambda y, *rest: lora_update(y.clone(), *rest, scale=1.3, dropout_p=p, seed=4)  # noqa: E731
    assert torch.autograd.gradcheck(call, (y, x, *factors()))


def test_second_derivative_raises():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    y = lora_update(torch.zeros(5, 6, dtype=torch.float64), x, *factors())
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("masters", [False, True])
def test_meets_the_tolerance_rule(poisoned_memory, dtype, masters):
    case = Case(65, 129, 63, 8, dtype, masters=masters, dropout_p=0.1)
    results = testing.lora_update.check_case(case, "auto")
    assert [r.tensor for r in results] == ["y", "dx", "dlora_A", "dlora_B"]
    assert all(r.ok for r in results), results
    low_rank = torch.float32 if masters else dtype
    dtypes = [tensor.dtype for tensor in run(make_inputs(case), case).values()]
    assert dtypes == [dtype, dtype, low_rank, low_rank]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_update_of_a_linear_product_is_lora_linear(backend):
    """The same mask, the same rounding of xa, the same gradients."""
    inputs = testing.make_inputs(9, 33, 17, 4, torch.float32)
    weight, bias, dy = (inputs.pop(name) for name in ("weight", "bias", "dy"))
    leaves = [inputs[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
    x, A, B = leaves
    options = {"scale": 0.5, "dropout_p": 0.3, "seed": 3}
    with lorasp.use_backend(backend):
        fused = lorasp.lora_linear(x, weight, A, B, bias, **options)
        apart = lora_update(linear(x, weight, bias), x, A, B, **options)
    with lorasp.use_backend("reference"):
        fused64 = lorasp.lora_linear(*(t.double() for t in (x, weight, A, B, bias)), **options)
    testing.assert_close(apart, fused, fused64, torch.float32)
    for one, other in zip(*(torch.autograd.grad(y, leaves, dy) for y in (apart, fused)), strict=True):
        testing.assert_close(one, other, other.double(), torch.float32)


def views(values):
    """The same values (4, 3, 6) laid out in every way that a product may come: with what lies around them."""
    wide = torch.full((4, 3, 11), math.nan)
    wide[..., 2:8] = values
    yield "slice", wide[..., 2:8], wide
    permuted = values.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    yield "permuted", permuted, permuted
    columns = values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    yield "column-major", columns, columns


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_any_strides_and_nothing_beside_y_is_written(backend):
    x, values = torch.randn(4, 3, 7), torch.randn(4, 3, 6)
    A, B = (factor.detach() for factor in factors(torch.float32))
    strided = torch.randn(7, 3, 4).permute(2, 1, 0).copy_(x)
    wanted64 = lora_update(values.double(), x.double(), A.double(), B.double())
    with lorasp.use_backend(backend):
        expected = lora_update(values.clone(), x, A, B)
        for name, y, memory in views(values):
            outside = memory.isnan().sum()
            have = lora_update(y, strided, A.t().contiguous().t(), B)
            testing.assert_close(have, expected, wanted64, torch.float32, name)
            assert memory.isnan().sum() == outside, name
        for y in (values[:, 0], values[:, 0].t().contiguous().t()):
            y = lora_update(y.clone(memory_format=torch.preserve_format), x[:, 0], A, B)
            testing.assert_close(y, expected[:, 0], wanted64[:, 0], torch.float32)


def test_a_value_that_backward_needs_is_not_overwritten_in_silence():
    x = torch.randn(5, 7, requires_grad=True)
    y = torch.randn(5, 6, requires_grad=True).tanh()
    lora_update(y, x, *factors(torch.float32))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("x_needs_grad", [False, True])
@pytest.mark.parametrize("trains", ["A and B", "B", "A", ""])
def test_memory_contract(trains, x_needs_grad, dropout_p):
    M, K, N, R = 24, 40, 56, 4
    lora_A, lora_B = factors(torch.bfloat16, K, N, R)
    lora_A.requires_grad_("A" in trains)
    lora_B.requires_grad_("B" in trains)
    x = torch.randn(M, K, dtype=torch.bfloat16, requires_grad=x_needs_grad)
    seed = 8 if dropout_p and (x_needs_grad or "A" in trains) else 0
    expected = 2 * M * (K * ("A" in trains) + R * ("B" in trains)) + seed

    def update():
        lora_update(torch.zeros(M, N, dtype=torch.bfloat16), x, lora_A, lora_B, dropout_p=dropout_p)

    assert saved_bytes(update, exclude=(lora_A, lora_B)) == expected


@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16])
def test_autocast_follows_the_product(y_dtype):
    """x is cast to y's dtype, whatever autocast would choose: the update never changes what y is."""
    x = torch.randn(9, 7, requires_grad=True)
    A, B = factors(torch.float32)
    y = torch.randn(9, 6).to(y_dtype)
    expected = lora_update(y.clone(), x.to(y_dtype), A, B)
    with torch.autocast("cpu", torch.bfloat16):
        lora_update(y, x, A, B)
    assert y.dtype == y_dtype
    assert torch.equal(y, expected)
    leaves = (x, A, B)
    for have, want in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (y, expected)), strict=True):
        assert have.dtype == torch.float32
        assert torch.equal(have, want)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_fullgraph_without_recompiling_for_new_sizes(backend):
    torch._dynamo.reset()
    weight = torch.randn(6, 7)
    leaves, seed = factors(torch.float32), torch.tensor(5)

    def step(x):
        return lora_update(linear(x, weight), x, *leaves, dropout_p=0.1, seed=seed).tanh()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    with lorasp.use_backend(backend):
        for M in (8, 2, 33):
            x = torch.randn(M, 7, requires_grad=True)
            y, expected = compiled(x), step(x)
            assert torch.equal(y, expected)
            for have, want in zip(
                torch.autograd.grad(y.sum(), [x, *leaves]), torch.autograd.grad(expected.sum(), [x, *leaves]),
                strict=True,
            ):  # fmt: skip
                assert torch.equal(have, want)
            counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_fake_cuda_metadata(backend):
    with torch._subclasses.FakeTensorMode():
        empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, device="cuda", dtype=dtype)  # noqa: E731
        x, y, lora_A, lora_B = empty(12, 64), empty(12, 32), empty(8, 64, dtype=torch.float32), empty(32, 8)
        seed = empty(dtype=torch.int64)
        xa = forward_ops[backend](y, x, lora_A, lora_B, seed, 1.0, 0.1, 0)
        gradients = backward_ops[backend](
            empty(12, 64), y, x, lora_A, lora_B, xa, seed, 1.0, 0.1, 0, True, True
        )  # fmt: skip
        assert [(tuple(t.shape), t.dtype, t.device.type) for t in (xa, *gradients)] == [
            ((12, 8), torch.bfloat16, "cuda"),
            ((8, 64), torch.float32, "cuda"),
            ((32, 8), torch.bfloat16, "cuda"),
        ]
        updated = lora_update(y.view(4, 3, 32), x.view(4, 3, 64), lora_A, lora_B, dropout_p=0.1)
        assert (updated.shape, updated.dtype, updated.device.type) == ((4, 3, 32), torch.bfloat16, "cuda")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck(backend):
    inputs = make_inputs(Case(6, 16, 12, 4))
    y, x, lora_A, lora_B, dy = (inputs[name] for name in ("y", "x", "lora_A", "lora_B", "dy"))
    scalars = (torch.tensor(3), 0.5, 0.25, 0)
    torch.library.opcheck(forward_ops[backend], (y, x, lora_A, lora_B, *scalars))
    xa = forward_ops[backend](y, x, lora_A, lora_B, *scalars)
    for dx, need_dA, need_dB in ((x.clone(), True, True), (None, False, True), (x.clone(), False, False)):
        arguments = (dx, dy, x if need_dA else None, lora_A, lora_B, xa if need_dB else None, *scalars)
        torch.library.opcheck(backward_ops[backend], (*arguments, need_dA, need_dB))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_dx_is_added_to_what_is_there(backend, p):
    inputs = make_inputs(Case(6, 16, 12, 4))
    there, A, B, dy = (inputs[name] for name in ("x", "lora_A", "lora_B", "dy"))
    keep = rng.keep_mask(3, (6, 16), p, rng.PURPOSE_LORA_DROPOUT)

    def formula(dtype):
        low_rank = (0.5 * rng.rescale(p)) * dy.to(dtype) @ B.to(dtype) @ A.to(dtype)
        return there.to(dtype) + torch.where(keep, low_rank, 0)

    dx = there.clone()
    backward_ops[backend](dx, dy, None, A, B, None, torch.tensor(3), 0.5, p, 0, False, False)
    testing.assert_close(dx, formula(torch.float32), formula(torch.float64), torch.float32)


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message)


T = torch.zeros


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        bad("y must be a Tensor, got list", TypeError, y=[1.0]),
        bad("x must be a Tensor, got NoneType", TypeError, x=None),
        bad("y must be torch.float64, torch.float32, torch.bfloat16, torch.float16, got torch.int64", TypeError,
            y=T(2, 4, dtype=torch.int64)),
        bad("y must be (..., N) with N >= 1, got (2, 0)", y=T(2, 0)),
        bad("y must be (2, 'N') like x, got (3, 4)", y=T(3, 4)),
        bad("x must be torch.float32 like y, got torch.bfloat16", TypeError, x=T(2, 8, dtype=torch.bfloat16)),
        bad("x must be on cpu like y, got meta", x=T(2, 8, device="meta")),
        bad("lora_A must be (R, 8) with R >= 1, got (0, 8)", lora_A=T(0, 8)),
        bad("lora_A must be torch.float32, got torch.float16", TypeError, lora_A=T(2, 8, dtype=torch.float16)),
        bad("lora_B must be (4, 2), got (2, 4)", lora_B=T(2, 4)),
        bad("scale must be a finite number, got inf", scale=math.inf),
        bad("dropout_p must be in [0, 1), got 1.0", dropout_p=1.0),
        bad("seed must be an int or a 0-d int64 tensor, got float", TypeError, seed=1.5, dropout_p=0.1),
        bad("y must not be a leaf that requires grad", y=T(2, 4, requires_grad=True)),
        bad("y must not overlap itself, got strides (0, 1)", y=T(4).expand(2, 4)),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_error(changes, error, message):
    arguments = {"y": T(2, 4), "x": T(2, 8), "lora_A": T(2, 8), "lora_B": T(4, 2)} | changes
    with pytest.raises(error) as caught:
        lora_update(**arguments)
    assert str(caught.value).startswith(f"lora_update: {message}")


def test_y_that_is_read_while_it_is_written_is_refused():
    square = torch.randn(4, 4)
    for y, x in ((square, square), (square, square.t()), (square[:3], square[1:])):
        with pytest.raises(ValueError, match="y must not share memory with x"):
            lora_update(y, x, T(2, 4), T(4, 2))

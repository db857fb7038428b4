"""lora_linear's public function: what it computes, what it saves, how it fails; on whatever backend `auto` chooses.

Backend against reference over the full grid of shapes: test_cpp_lora_linear.py, test_triton_lora_linear.py.
"""

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear

import lorasp
from lorasp import lora_linear, rng, testing
from lorasp.functional import arguments as shared_checks
from lorasp.ops import registry
from lorasp.ops.lora_linear import backward_ops, forward_ops
from lorasp.testing import Case, make_inputs

HALVES = (torch.bfloat16, torch.float16)
LEAVES = ("x", "weight", "lora_A", "lora_B", "bias")


def leaves(dtype=torch.float64, M=5, K=7, N=6, R=3, **kwargs):
    inputs = make_inputs(M, K, N, R, dtype, **kwargs)
    return [inputs[name].requires_grad_() for name in LEAVES], inputs


def composition(x, weight, lora_A, lora_B, bias=None, *, scale=1.0, keep=None, p=0.0):
    """The textbook formula, left to autograd."""
    dropped = x if keep is None else torch.where(keep, x, 0) * rng.rescale(p)
    return linear(x, weight, bias) + scale * linear(linear(dropped, lora_A), lora_B)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_equals_the_formula_and_autograd(p):
    arguments, inputs = leaves()
    keep = rng.keep_mask(9, (5, 7), p, rng.PURPOSE_LORA_DROPOUT)
    expected = composition(*arguments, scale=0.7, keep=keep, p=p)
    y = lora_linear(*arguments, scale=0.7, dropout_p=p, seed=9)
    torch.testing.assert_close(y, expected)
    for have, want in zip(
        torch.autograd.grad(y, arguments, inputs["dy"]),
        torch.autograd.grad(expected, arguments, inputs["dy"]),
        strict=True,
    ):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 3, 7)])
def test_gradcheck(shape, p):
    arguments, _ = leaves()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *rest: lora_linear(x, *rest, scale=1.3, dropout_p=p, seed=4), (x, *arguments[1:])
    )


def test_second_derivative_raises():
    arguments, _ = leaves()
    (grad,) = torch.autograd.grad(lora_linear(*arguments).square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_meets_the_tolerance_rule(dtype, masters, p):
    case = Case(65, 129, 63, 8, dtype, masters=masters, dropout_p=p, masks=True)
    results = testing.check_case(case, "auto", "auto")
    assert [r.tensor for r in results] == ["y", "dx", "dlora_A", "dlora_B"]
    assert all(r.ok for r in results), results


def test_the_rule_notices_a_missing_low_rank_term():
    inputs = make_inputs(64, 256, 256, 8, torch.bfloat16)
    inputs64 = {name: t.double() if t is not None else None for name, t in inputs.items()}
    reference64 = testing.lora_linear.run(inputs64, Case(64, 256, 256, 8, torch.float64))["y"]
    reference = testing.lora_linear.run(inputs, Case(64, 256, 256, 8))["y"]
    frozen_only = linear(inputs["x"], inputs["weight"], inputs["bias"])
    with pytest.raises(AssertionError, match="exceeds"):
        testing.assert_close(frozen_only, reference, reference64, torch.bfloat16)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_have_the_leaves_dtypes_and_shapes(dtype, masters):
    case = Case(9, 33, 17, 3, dtype, masters=masters)
    results = testing.lora_linear.run(make_inputs(9, 33, 17, 3, dtype, masters=masters), case)
    low_rank = torch.float32 if masters else dtype
    assert {name: (tuple(t.shape), t.dtype) for name, t in results.items()} == {
        "y": ((9, 17), dtype),
        "dx": ((9, 33), dtype),
        "dlora_A": ((3, 33), low_rank),
        "dlora_B": ((17, 3), low_rank),
    }


def test_masked_entries_get_exactly_zero_even_where_the_gradient_is_nan():
    inputs = make_inputs(8, 16, 12, 4, torch.float32, masks=True)
    inputs["x"][0] = math.nan
    results = testing.lora_linear.run(inputs, Case(8, 16, 12, 4, masks=True))
    assert (results["dlora_A"][~inputs["mask_A"]] == 0).all()
    assert (results["dlora_B"][~inputs["mask_B"]] == 0).all()
    assert results["dlora_A"][inputs["mask_A"]].isnan().any()


def test_a_dropped_nan_does_not_leak_into_the_low_rank_path():
    keep = rng.keep_mask(1, (4, 16), 0.5, 0)
    row, column = (~keep).nonzero()[0].tolist()
    inputs = make_inputs(4, 16, 8, 2, torch.float32, zero_weight=True)
    inputs["x"][row, column] = math.inf
    results = testing.lora_linear.run(inputs, Case(4, 16, 8, 2, dropout_p=0.5))
    assert results["dlora_A"].isfinite().all()
    assert results["dlora_B"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous_inputs(dtype):
    inputs = make_inputs(24, 32, 20, 5, dtype)
    case = Case(24, 32, 20, 5, dtype)
    expected = testing.lora_linear.run(inputs, case)
    strided = {
        name: t if t is None else (t.t().contiguous().t() if t.ndim == 2 else torch.stack([t, t], -1)[:, 0])
        for name, t in inputs.items()
    }
    for name, have in testing.lora_linear.run(strided, case).items():
        testing.assert_close(have, expected[name], expected[name].double(), dtype, name)


def test_expanded_gradient_and_leading_dimensions():
    x = torch.randn(2, 3, 16, requires_grad=True)
    inputs = make_inputs(1, 16, 8, 2, torch.float32)
    arguments = [inputs[name] for name in LEAVES[1:]]
    y = lora_linear(x, *arguments)
    assert y.shape == (2, 3, 8)
    y.sum().backward()
    expected = torch.autograd.grad(composition(x, *arguments).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_same_seed_same_bits_and_manual_seed_reproduces():
    arguments, _ = leaves(torch.float32, M=64, K=64)
    draw = lambda seed=None: lora_linear(*arguments, dropout_p=0.5, seed=seed)  # noqa: E731
    assert torch.equal(draw(3), draw(torch.tensor(3)))
    assert not torch.equal(draw(3), draw(4))
    torch.manual_seed(0)
    first = draw()
    torch.manual_seed(0)
    assert torch.equal(first, draw())
    assert not torch.equal(first, draw())


def test_bitwise_repeatable():
    inputs = make_inputs(300, 200, 100, 16, torch.bfloat16)
    case = Case(300, 200, 100, 16, torch.bfloat16, dropout_p=0.1)
    first, second = (testing.lora_linear.run(inputs, case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_reads_no_uninitialised_memory(poisoned_memory):
    for p in (0.0, 0.1):
        for shape in ((3, 5, 7, 2), (130, 65, 33, 24)):
            results = testing.check_case(Case(*shape, torch.bfloat16, dropout_p=p), "auto", "auto")
            assert all(r.ok for r in results), results


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_what_linear_computes(x_dtype, weight_dtype):
    inputs = make_inputs(16, 32, 24, 4, torch.float32)
    x = inputs["x"].to(x_dtype).requires_grad_()
    weight = inputs["weight"].to(weight_dtype)
    lora_A, lora_B = (inputs[name].requires_grad_() for name in ("lora_A", "lora_B"))
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, weight, lora_A, lora_B, inputs["bias"])
        assert y.dtype == linear(x, weight, inputs["bias"]).dtype == torch.bfloat16
    y.sum().backward()
    assert (x.grad.dtype, lora_A.grad.dtype, lora_B.grad.dtype) == (x_dtype, torch.float32, torch.float32)
    plain = lora_linear(x.bfloat16(), weight.bfloat16(), lora_A, lora_B, inputs["bias"].bfloat16())
    assert torch.equal(y, plain)


def test_autocast_of_a_device_that_torch_learnt_of_later(monkeypatch):
    monkeypatch.setattr(shared_checks, "_AUTOCAST_DEVICES", frozenset())
    inputs = make_inputs(4, 8, 6, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_linear(*(inputs[name] for name in ("x", "weight", "lora_A", "lora_B"))).dtype == torch.bfloat16


def test_autocast_leaves_float64_alone():
    arguments, _ = leaves()
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_linear(*arguments).dtype == torch.float64


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_fullgraph_without_recompiling_for_new_sizes(p, backend):
    torch._dynamo.reset()
    inputs = make_inputs(8, 32, 24, 4, torch.float32)
    lora_A, lora_B = (inputs[name].requires_grad_() for name in ("lora_A", "lora_B"))
    seed = torch.tensor(5) if p else None

    def step(x):
        return lora_linear(x, inputs["weight"], lora_A, lora_B, inputs["bias"], dropout_p=p, seed=seed)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    with lorasp.use_backend(backend):
        for M in (8, 2, 33):
            x = torch.randn(M, 32, requires_grad=True)
            y = compiled(x)
            y.sum().backward()
            expected = step(x)
            assert torch.equal(y, expected)
            counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_inductor_gives_the_same_function(p):
    torch._dynamo.reset()
    inputs = make_inputs(16, 32, 24, 4, torch.float32)
    case = Case(16, 32, 24, 4, dropout_p=p)
    expected = testing.lora_linear.run(inputs, case)
    compiled = torch.compile(lora_linear, fullgraph=True, dynamic=False)
    for name, have in testing.lora_linear.run(inputs, case, compiled).items():
        testing.assert_close(have, expected[name], expected[name].double(), torch.float32, name)


def test_checkpointing_redraws_the_same_mask():
    from torch.utils.checkpoint import checkpoint

    arguments, _ = leaves(torch.float32, M=16, K=32)
    grads = []
    for wrapped in (False, True):
        torch.manual_seed(1)
        call = lambda *a: lora_linear(*a, dropout_p=0.5).tanh()  # noqa: E731
        y = checkpoint(call, *arguments, use_reentrant=False) if wrapped else call(*arguments)
        grads.append(torch.autograd.grad(y.sum(), arguments))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_fake_cuda_metadata(backend):
    with torch._subclasses.FakeTensorMode():
        empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, device="cuda", dtype=dtype)  # noqa: E731
        x, weight, lora_A, lora_B = empty(12, 64), empty(32, 64), empty(8, 64, dtype=torch.float32), empty(32, 8)
        seed = torch.empty((), device="cuda", dtype=torch.int64)
        outputs = forward_ops[backend](x, weight, None, lora_A, lora_B, seed, 1.0, 0.1, 0, "auto", None)
        outputs += backward_ops[backend](
            outputs[0], x, weight, lora_A, lora_B, outputs[1], seed, None, None, 1.0, 0.1, 0, True, True, True, "auto",
            None,
        )  # fmt: skip
        assert [(tuple(t.shape), t.dtype, t.device.type) for t in outputs] == [
            ((12, 32), torch.bfloat16, "cuda"),
            ((12, 8), torch.bfloat16, "cuda"),
            ((12, 64), torch.bfloat16, "cuda"),
            ((8, 64), torch.float32, "cuda"),
            ((32, 8), torch.bfloat16, "cuda"),
        ]
        y = lora_linear(x.view(4, 3, 64), weight, lora_A, lora_B, dropout_p=0.1)
        assert (y.shape, y.dtype, y.device.type) == ((4, 3, 32), torch.bfloat16, "cuda")


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message)


T = torch.zeros


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        bad("x must be a Tensor, got list", TypeError, x=[1.0]),
        bad("x must be torch.float64, torch.float32, torch.bfloat16, torch.float16, got torch.int64", TypeError,
            x=T(2, 8, dtype=torch.int64)),
        bad("x must be (..., K) with K >= 1, got ()", x=T(())),
        bad("weight must be (N, 8), got (4, 9)", weight=T(4, 9)),
        bad("weight must be torch.float32, got torch.bfloat16", TypeError, weight=T(4, 8, dtype=torch.bfloat16)),
        bad("weight must be a Tensor, got NoneType", TypeError, weight=None),
        bad("lora_A must be (R, 8) with R >= 1, got (0, 8)", lora_A=T(0, 8)),
        bad("lora_A must be (R, 8) with R >= 1, got (8, 2)", lora_A=T(8, 2)),
        bad("lora_A must be torch.float32, got torch.float16", TypeError, lora_A=T(2, 8, dtype=torch.float16)),
        bad("lora_B must be (4, 2), got (2, 4)", lora_B=T(2, 4)),
        bad("lora_B must be on cpu like x, got meta", lora_B=T(4, 2, device="meta")),
        bad("bias must be (4,), got (1, 4)", bias=T(1, 4)),
        bad("mask_A must be (2, 8), got (4, 2)", mask_A=T(4, 2, dtype=torch.bool)),
        bad("mask_B must be torch.bool, got torch.float32", TypeError, mask_B=T(4, 2)),
        bad("scale must be a finite number, got inf", scale=math.inf),
        bad("scale must be a finite number, got tensor(1.)", scale=torch.tensor(1.0)),
        bad("dropout_p must be in [0, 1), got 1.0", dropout_p=1.0),
        bad("dropout_p must be in [0, 1), got -0.1", dropout_p=-0.1),
        bad("dropout_p must be below 1 - 2^-17", dropout_p=0.999999),
        bad("seed must be an int or a 0-d int64 tensor, got float", TypeError, seed=1.5, dropout_p=0.1),
        bad("seed must be in [-2^63, 2^63), got 9223372036854775808", seed=2**63, dropout_p=0.1),
        bad("seed must be an int or a 0-d int64 tensor on cpu, got torch.int32 () on cpu", dropout_p=0.1,
            seed=torch.zeros((), dtype=torch.int32)),
        bad("plan must be one of auto, addmm, fused, onepass, got 'fast'", plan="fast"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_error(changes, error, message):
    arguments = {"x": T(2, 8), "weight": T(4, 8), "lora_A": T(2, 8), "lora_B": T(4, 2)} | changes
    with pytest.raises(error) as caught:
        lora_linear(**arguments)
    assert str(caught.value).startswith(f"lora_linear: {message}")


def test_forced_backend_never_falls_back():
    arguments, _ = leaves()
    with pytest.raises(ValueError, match="must be one of auto, reference"), lorasp.use_backend("fast"):
        pass
    with pytest.raises(ValueError, match="cuda is not available"), lorasp.use_backend("cuda"):
        pass
    for name, reason in lorasp.available_backends().items():
        if reason is None and name != "reference":
            with lorasp.use_backend(name), pytest.raises(ValueError, match=r"does not compute in torch\.float64"):
                lora_linear(*arguments)
    with lorasp.use_backend("reference"), pytest.raises(ValueError, match="plan must be auto for backend reference"):
        lora_linear(*arguments, plan="fused")


def test_backward_uses_the_backend_of_the_forward(monkeypatch):
    arguments, _ = leaves(torch.float32)
    with lorasp.use_backend("reference"):
        y = lora_linear(*arguments)
    assert y.grad_fn is not None
    calls = []
    monkeypatch.setitem(backward_ops, "reference", lambda *a, op=backward_ops["reference"]: calls.append(1) or op(*a))
    y.sum().backward()
    assert calls == [1]


def test_use_backend_is_restored_after_an_error():
    with pytest.raises(RuntimeError), lorasp.use_backend("reference"):
        raise RuntimeError
    assert registry._forced_backend is None


@settings(max_examples=60)
@given(
    M=st.integers(0, 40),
    K=st.integers(1, 70),
    N=st.integers(1, 70),
    R=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, *HALVES]),
    bias=st.booleans(),
    freeze_A=st.booleans(),
    need_dx=st.booleans(),
    masks=st.booleans(),
    masters=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 1000),
)
def test_any_shape_meets_the_rule(M, K, N, R, dtype, bias, freeze_A, need_dx, masks, masters, p, seed):
    case = Case(M, K, N, R, dtype, bias, p, freeze_A, need_dx, masters, masks, seed=seed)
    results = testing.check_case(case, "auto", "auto")
    assert all(r.ok for r in results), (case, [r for r in results if not r.ok])


@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_an_extension_older_than_the_sources_is_an_error(backend):
    if lorasp.available_backends()["cpp"] is not None:
        pytest.skip("the C++ extension is not built")
    with lorasp.use_backend(backend), pytest.raises(RuntimeError, match=r"^brand_new: .* is older than this package"):
        registry.choose("brand_new", "cpu", torch.float32)

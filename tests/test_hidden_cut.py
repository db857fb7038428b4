"""hidden_cut's public function: what it computes, what it keeps, how it fails; on whatever backend `auto` chooses.

Backend against reference: test_cpp_hidden_cut.py, test_triton_hidden_cut.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import lorasp
from lorasp import hidden_cut, rng, testing
from lorasp.ops import hidden_cut as ops
from lorasp.ops import registry
from lorasp.testing.hidden_cut import Case, check_case, make_inputs, run

PATTERNS = ("element", "column", "span")
HALVES = (torch.bfloat16, torch.float16)
CPU_BACKENDS = [
    name for name in ("reference", "cpp", "triton") if registry.unsupported(name, "cpu", torch.float32) is None
]


def kept(shape, p, pattern, seed):
    """D, from the definition of the masks alone."""
    if pattern == "element":
        return rng.keep_mask(seed, shape, p, rng.PURPOSE_HIDDEN_CUT) * rng.rescale(p)
    draw = rng.keep_mask if pattern == "column" else rng.span_keep_mask
    return draw(seed, shape[:2], p, rng.PURPOSE_HIDDEN_CUT).unsqueeze(-1).expand(shape).double()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_equals_the_formula_and_autograd(pattern, with_residual):
    x, residual, dy = torch.randn(3, 2, 11, 6, dtype=torch.float64).requires_grad_()
    D = kept((2, 11, 6), 0.4, pattern, seed=9)
    leaves = (x, residual) if with_residual else (x,)
    expected = D * x + residual if with_residual else D * x
    y = hidden_cut(x, 0.4, pattern=pattern, residual=residual if with_residual else None, seed=9)
    torch.testing.assert_close(y, expected)
    for have, want in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(4, 3), (0, 5, 3), (2, 1, 5, 3)])
def test_gradcheck(pattern, shape):
    x, residual = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda x, residual: hidden_cut(x, 0.5, pattern=pattern, residual=residual, seed=4), (x, residual)
    )


def test_second_derivative_raises():
    x = torch.randn(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(hidden_cut(x, 0.5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("S", [1, 2, 10, 37])
@pytest.mark.parametrize("p", [0.01, 0.25, 0.99])
def test_a_span_is_one_run_of_the_stated_length(S, p):
    y = hidden_cut(torch.ones(50, S, 2), p, pattern="span", seed=1)
    assert torch.equal(y[..., 0], y[..., 1])
    dropped = y[..., 0] == 0
    length = min(S - 1, max(1, int(p * S)))
    assert (dropped.sum(1) == length).all()
    edges = dropped.int().diff(dim=1, prepend=torch.zeros(50, 1, dtype=torch.int32)).eq(1).sum(1)
    assert (edges == (length > 0)).all()


def test_a_column_is_a_token_and_nothing_is_rescaled():
    y = hidden_cut(torch.full((4, 500, 3), 2.0), 0.3, pattern="column", seed=1)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(y[..., 0], y[..., 2])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rates_and_mean_are_unbiased(pattern):
    y = hidden_cut(torch.ones(64, 100, 64), 0.25, pattern=pattern, seed=3)
    rate = (y == 0).double().mean().item()
    draws = 64 * 100 * (64 if pattern == "element" else 1)
    five_sigma = 0.0 if pattern == "span" else 5 * (0.25 * 0.75 / draws) ** 0.5
    assert abs(rate - 0.25) <= five_sigma
    if pattern == "element":
        assert abs(y.double().mean().item() - 1) <= 5 * (0.25 / 0.75 / draws) ** 0.5


@pytest.mark.parametrize("residual_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_meets_the_tolerance_rule_and_promotes_like_an_add(dtype, residual_dtype):
    for pattern in PATTERNS:
        case = Case(2, 33, 65, dtype, pattern, 0.2, residual_dtype)
        assert all(result.ok for result in check_case(case, "auto"))
    inputs = make_inputs(case)
    outputs = run(inputs, case)
    summed = inputs["x"] if residual_dtype is None else inputs["x"] + inputs["residual"]
    assert outputs["y"].dtype == summed.dtype
    assert outputs["dx"].dtype == dtype
    if residual_dtype is not None:
        assert outputs["dresidual"].dtype == residual_dtype
        assert torch.equal(outputs["dresidual"], inputs["dy"].to(residual_dtype))


def test_p_zero_is_the_plain_add():
    x, residual = torch.randn(2, 2, 3, 4, requires_grad=True)
    for p in (0, 0.0, 1e-9):
        assert hidden_cut(x, p) is x
        assert torch.equal(hidden_cut(x, p, residual=residual), x + residual)
    assert hidden_cut(x, 1e-9, pattern="span", seed=0).eq(0).all(-1).sum() == 2  # a span is at least one token


@pytest.mark.parametrize("pattern", PATTERNS)
def test_backward_keeps_eight_bytes(pattern):
    x, residual = (torch.randn(2, 64, 32, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        hidden_cut(x, 0.1, pattern=pattern, residual=residual)
    assert [t.untyped_storage().nbytes() for t in saved] == [8]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dropped_nan_and_inf_do_not_leak(pattern):
    D = kept((2, 9, 5), 0.5, pattern, seed=2)
    x = torch.where(D > 0, torch.ones(()), torch.nan).requires_grad_()
    y = hidden_cut(x, 0.5, pattern=pattern, residual=torch.zeros(2, 9, 5), seed=2)
    assert y.isfinite().all()
    dy = torch.where(D > 0, torch.ones(()), torch.inf)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.isfinite().all()
    assert (dx[D == 0] == 0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_strides_and_expanded_gradients_do_not_matter(pattern):
    x, residual, dy = torch.randn(3, 3, 7, 10)
    call = lambda x, residual: hidden_cut(x, 0.4, pattern=pattern, residual=residual, seed=6)  # noqa: E731
    expected = call(x, residual)
    views = (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.stack([t, t], -1)[..., 1],
        lambda t: torch.cat([t, t], 2)[..., :10],
    )
    for view in views:
        leaf = view(x).requires_grad_()
        assert torch.equal(call(leaf, view(residual)), expected)
        y = call(leaf, residual)
        assert torch.equal(
            torch.autograd.grad(y, leaf, view(dy))[0], torch.autograd.grad(call(leaf, residual), leaf, dy)[0]
        )
    leaf = x.clone().requires_grad_()
    (summed,) = torch.autograd.grad(call(leaf, None).sum(), leaf)
    (ones,) = torch.autograd.grad(call(leaf, None), leaf, torch.ones_like(x))
    assert torch.equal(summed, ones)


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=4),
    st.sampled_from(PATTERNS),
    st.sampled_from([torch.float32, *HALVES]),
    st.floats(0.01, 0.99),
)
def test_any_shape(shape, pattern, dtype, p):
    x = (torch.rand(shape) + 1).to(dtype).requires_grad_()
    outputs = []
    for backend in ("auto", "reference"):
        with lorasp.use_backend(backend):
            y = hidden_cut(x, p, pattern=pattern, seed=1)
            added = hidden_cut(x, p, pattern=pattern, residual=torch.ones_like(x), seed=1)
        outputs.append((y, added - 1, *torch.autograd.grad(y, x, torch.ones_like(y))))
    for have, want in zip(*outputs, strict=True):
        assert have.shape == tuple(shape)
        assert torch.equal(have.eq(0), want.eq(0))


def test_same_seed_same_bits_and_manual_seed_reproduces():
    x = torch.randn(4, 16, 16)
    assert torch.equal(hidden_cut(x, 0.5, seed=3), hidden_cut(x, 0.5, seed=torch.tensor(3)))
    assert not torch.equal(hidden_cut(x, 0.5, seed=3), hidden_cut(x, 0.5, seed=4))
    torch.manual_seed(0)
    first = hidden_cut(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(first, hidden_cut(x, 0.5))


def test_checkpointing_redraws_the_same_mask():
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(2, 16, 32, requires_grad=True)
    grads = []
    for wrapped in (False, True):
        torch.manual_seed(1)
        call = lambda x: hidden_cut(x, 0.5, residual=x).tanh()  # noqa: E731
        y = checkpoint(call, x, use_reentrant=False) if wrapped else call(x)
        grads.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_compiles_fullgraph_without_recompiling_for_new_sizes(pattern):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    seed = torch.tensor(5)
    step = lambda x: hidden_cut(x, 0.3, pattern=pattern, residual=x, seed=seed)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for S in (8, 2, 33):
        x = torch.randn(2, S, 16, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        assert torch.equal(y, step(x))
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck(backend, pattern):
    x, residual, seed = torch.randn(2, 5, 6), torch.randn(2, 5, 6), torch.tensor(3)
    for added in (None, residual, residual.half()):
        torch.library.opcheck(ops.forward_ops[backend], (x, added, seed, 0.3, pattern))
    torch.library.opcheck(ops.backward_ops[backend], (x, seed, 0.3, pattern, torch.float16))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_fake_cuda_metadata(backend):
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 5, 6, device="cuda", dtype=torch.bfloat16)
        residual, seed = x.float(), torch.empty((), device="cuda", dtype=torch.int64)
        y = ops.forward_ops[backend](x, residual, seed, 0.3, "element")
        dx = ops.backward_ops[backend](y, seed, 0.3, "element", torch.bfloat16)
        assert [(t.shape, t.dtype, t.device.type) for t in (y, dx)] == [
            (x.shape, torch.float32, "cuda"), (x.shape, torch.bfloat16, "cuda"),
        ]  # fmt: skip


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        bad("x must be a Tensor, got list", TypeError, x=[1.0]),
        bad("x must be torch.float64, torch.float32, torch.bfloat16, torch.float16, got torch.int64", TypeError,
            x=torch.zeros(2, 3, dtype=torch.int64)),
        bad("x must be (..., S, F), got (3,)", x=torch.zeros(3)),
        bad("residual must be (2, 3) like x, got (3, 2)", residual=torch.zeros(3, 2)),
        bad("residual must be a Tensor, got float", TypeError, residual=1.0),
        bad("residual must be on cpu like x, got meta", residual=torch.zeros(2, 3, device="meta")),
        bad("residual must be torch.float64 or torch.float32 or torch.bfloat16 or torch.float16, got torch.int64",
            TypeError, residual=torch.zeros(2, 3, dtype=torch.int64)),
        bad("p must be in [0, 1), got 1.0", p=1.0),
        bad("p must be in [0, 1), got -0.1", p=-0.1),
        bad("p must be in [0, 1), got None", p=None),
        bad("p must be below 1 - 2^-17", p=0.999999),
        bad("pattern must be one of element, column, span, got 'row'", pattern="row"),
        bad("seed must be an int or a 0-d int64 tensor, got float", TypeError, seed=1.5),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_error(changes, error, message):
    arguments = {"x": torch.zeros(2, 3), "p": 0.5} | changes
    with pytest.raises(error) as caught:
        hidden_cut(**arguments)
    assert str(caught.value).startswith(f"hidden_cut: {message}")


def test_a_forced_backend_never_falls_back():
    for name, reason in lorasp.available_backends().items():
        if reason is None and name != "reference":
            with lorasp.use_backend(name), pytest.raises(ValueError, match=r"does not compute in torch\.float64"):
                hidden_cut(torch.zeros(2, 3, dtype=torch.float64), 0.0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_check_covers_it(backend):
    results = testing.check("hidden_cut", backend, shapes=[(2, 5, 9)])
    assert results
    assert all(result.ok for result in results)

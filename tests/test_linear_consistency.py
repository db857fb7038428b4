"""linear_consistency_loss: consistency_loss through the output head, without the logits."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile

import lorasp
from lorasp import consistency_loss, linear_consistency_loss, testing
from lorasp.ops import linear_consistency as ops
from lorasp.ops import registry
from lorasp.testing.linear_consistency import Case, check_case, make_inputs, run

KINDS = ("kl", "js")
REDUCTIONS = ("batchmean", "mean", "sum", "none")
NAMES = ("hidden", "other_hidden", "lm_head", "bias")
CPU_BACKENDS = [
    name for name in ("reference", "cpp", "triton") if registry.unsupported(name, "cpu", torch.float32) is None
]


def leaves(rows=(2, 5), H=6, V=13, dtype=torch.float64):
    shapes = (*rows, H), (*rows, H), (V, H), (V,)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def plain(hidden, other, lm_head, bias=None, *arguments):
    return consistency_loss(linear(hidden, lm_head, bias), linear(other, lm_head, bias), *arguments)


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of rows, several pieces of dW."""
    monkeypatch.setattr(ops, "LOGITS_BYTES", 3000)
    monkeypatch.setattr(ops, "PIECE_BYTES", 600)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loss_of_the_logits(kind, reduction, masked):
    arguments = leaves()
    mask = torch.rand(2, 5) < 0.6 if masked else None
    loss = linear_consistency_loss(*arguments, kind, mask, reduction)
    expected = plain(*arguments, kind, mask, reduction)
    torch.testing.assert_close(loss, expected)
    upstream = torch.randn_like(loss)
    for have, want in zip(
        torch.autograd.grad(loss, arguments, upstream), torch.autograd.grad(expected, arguments, upstream), strict=True
    ):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction, kind):
    call = lambda *a: linear_consistency_loss(*a, kind, None, reduction)  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(leaves((3,), 4, 5)))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_second_derivative_raises(reduction):
    arguments = leaves()
    loss = linear_consistency_loss(*arguments, reduction=reduction).square().sum()
    (grad,) = torch.autograd.grad(loss, arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_meets_the_tolerance_rule_in_chunks(dtype, small_chunks):
    for case in testing.linear_consistency.cases([(37, 20, 129), (5, 3, 1)], [dtype]):
        for result in check_case(case, "auto"):
            assert result.ok, result


@pytest.mark.parametrize("needs", [("hidden",), ("other_hidden",), ("lm_head",), ("bias",), ("hidden", "bias")])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_any_subset_of_gradients(needs, reduction, small_chunks):
    case = Case(29, 12, 70, bias=True, masks=True, reduction=reduction, needs=NAMES)
    inputs = make_inputs(case)
    every = run(inputs, case)
    some = run(inputs, Case(29, 12, 70, bias=True, masks=True, reduction=reduction, needs=needs))
    assert some.keys() == {"loss", *(f"d{name}" for name in needs)}
    assert all(torch.equal(some[name], every[name]) for name in some)


def test_backward_twice_over_a_retained_graph():
    arguments = leaves()
    loss = linear_consistency_loss(*arguments)
    first = torch.autograd.grad(loss * 3, arguments, retain_graph=True)
    second = torch.autograd.grad(loss, arguments)
    for three, one in zip(first, second, strict=True):
        torch.testing.assert_close(three, 3 * one)


def test_masked_rows_add_nothing_whatever_they_hold(small_chunks, poisoned_memory):
    hidden, other, lm_head, bias = leaves((40,), 6, 50, torch.float32)
    mask = torch.rand(40) < 0.5
    spoilt = hidden.detach().masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    loss = linear_consistency_loss(spoilt, other, lm_head, bias, mask=mask)
    torch.testing.assert_close(loss, linear_consistency_loss(hidden[mask], other[mask], lm_head, bias))
    for gradient in torch.autograd.grad(loss, (spoilt, other, lm_head, bias)):
        assert gradient.isfinite().all()


def test_no_row_is_no_loss():
    arguments = leaves((0,))
    loss = linear_consistency_loss(*arguments)
    assert loss.item() == 0.0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, arguments))


@pytest.mark.parametrize("lm_head_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_what_linear_computes(lm_head_dtype):
    hidden, other, lm_head, _ = leaves(dtype=torch.float32)
    lm_head = lm_head.detach().to(lm_head_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_consistency_loss(hidden, other, lm_head)
    expected = linear_consistency_loss(hidden.bfloat16(), other.bfloat16(), lm_head.bfloat16())
    assert torch.equal(loss, expected)
    loss.backward()
    assert [t.grad.dtype for t in (hidden, other, lm_head)] == [torch.float32, torch.float32, lm_head_dtype]


def test_backward_keeps_gradients_only_and_no_grad_keeps_and_forms_nothing():
    hidden, other, lm_head, _ = leaves((64,), 8, 500, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_consistency_loss(hidden, other.detach(), lm_head.detach())
    assert sorted(t.untyped_storage().nbytes() for t in saved) == [4, 64 * 8 * 2]
    calls = []
    original = ops.ops["reference"]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), lorasp.use_backend("reference"):
        patch.setitem(ops.ops, "reference", lambda *a: calls.append(a[-4:]) or original(*a))
        linear_consistency_loss(hidden, other, lm_head)
    assert calls == [(False,) * 4]


def peak_bytes(step):
    """Highest sum of live allocations of torch's CPU allocator inside step(), over what lived before."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True, with_stack=True
    ) as profiler:
        kept = step()
    del kept
    changes = [e for e in profiler._memory_profile().timeline if e[1].name in ("CREATE", "DESTROY", "PREEXISTING")]
    live = peak = 0
    for _, action, _, size in changes:
        live += {"CREATE": size, "DESTROY": -size}.get(action.name, 0)
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("V", [32_000, 256_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace_is_below_64_mib(V, dtype):
    rows, H = (700, 64) if V == 32_000 else (100, 64)  # below 64 features the matrix library pads a copy of lm_head
    hidden, other = (torch.randn(rows, H, dtype=dtype).requires_grad_() for _ in range(2))
    lm_head = torch.randn(V, H, dtype=dtype)
    step = lambda: torch.autograd.grad(linear_consistency_loss(hidden, other, lm_head), (hidden, other))  # noqa: E731
    results = 2 * 2 * rows * H * dtype.itemsize
    both_logits = 2 * rows * V * dtype.itemsize
    assert peak_bytes(step) - results < 64 << 20
    assert both_logits > 64 << 20


def test_workspace_with_a_trained_head_is_its_gradient_and_less_than_64_mib():
    V, H, rows = 32_000, 256, 700
    hidden, other = (torch.randn(rows, H, dtype=torch.bfloat16) for _ in range(2))
    lm_head = torch.randn(V, H, dtype=torch.bfloat16, requires_grad=True)
    loss_bytes = peak_bytes(lambda: linear_consistency_loss(hidden, other, lm_head))
    accumulated, rounded = V * H * 4, V * H * 2
    assert loss_bytes - accumulated - rounded < 64 << 20


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_compiles_fullgraph_without_recompiling_for_new_sizes(reduction):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = lambda *a: linear_consistency_loss(*a, reduction=reduction)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    _, _, lm_head, bias = leaves(dtype=torch.float32)
    counts = []
    for rows in (8, 2, 33):
        hidden, other, _, _ = leaves((2, rows), dtype=torch.float32)
        loss = compiled(hidden, other, lm_head, bias)
        loss.sum().backward()
        assert torch.equal(loss, step(hidden, other, lm_head, bias))
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("needs", [(True, True, True, True), (False, True, False, False), (False,) * 4])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck(backend, needs):
    hidden, other, lm_head, bias = (leaf.detach() for leaf in leaves((5,), dtype=torch.float32))
    mask, drows = torch.rand(5) < 0.5, torch.randn(5)
    torch.library.opcheck(ops.ops[backend], (hidden, other, lm_head, bias, mask, drows, "kl", *needs))


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message)


T = torch.zeros


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        bad("hidden must be a Tensor, got list", TypeError, hidden=[1.0]),
        bad("hidden must be (..., H) with H >= 1, got (2, 0)", hidden=T(2, 0)),
        bad("other_hidden must be (2, 3) like hidden, got (2, 4)", other_hidden=T(2, 4)),
        bad("lm_head must be (V, 3) with V >= 1, got (4, 2)", lm_head=T(4, 2)),
        bad("lm_head must be torch.float32, got torch.bfloat16", TypeError, lm_head=T(4, 3).bfloat16()),
        bad("bias must be (4,), got (3,)", bias=T(3)),
        bad("mask must be (2,) like the rows of hidden, got (3,)", mask=T(3, dtype=torch.bool)),
        bad("kind must be one of kl, js, got ''", kind=""),
        bad("reduction must be one of batchmean, mean, sum, none, got 'max'", reduction="max"),
    ],
)
def test_bad_input_gets_one_clear_error(changes, error, message):
    arguments = {"hidden": T(2, 3), "other_hidden": T(2, 3), "lm_head": T(4, 3)} | changes
    with pytest.raises(error) as caught:
        linear_consistency_loss(**arguments)
    assert str(caught.value).startswith(f"linear_consistency_loss: {message}")

"""consistency_loss: what it computes, what it keeps, how it fails; on whatever backend `auto` chooses.

linear_consistency_loss: test_linear_consistency.py. Backend against reference: test_cpp_consistency.py,
test_triton_consistency.py.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import kl_div, log_softmax

import lorasp
from lorasp import consistency_loss, testing
from lorasp.ops import consistency as ops
from lorasp.ops import registry
from lorasp.testing.consistency import Case, check_case, make_inputs

KINDS = ("kl", "js")
HALVES = (torch.bfloat16, torch.float16)
REDUCTIONS = ("batchmean", "mean", "sum", "none")
CPU_BACKENDS = [
    name for name in ("reference", "cpp", "triton") if registry.unsupported(name, "cpu", torch.float32) is None
]


def pair(*shape, dtype=torch.float64, spread=3.0):
    logits = torch.randn(shape, dtype=torch.float64) * spread
    return [side.to(dtype).requires_grad_() for side in (logits, logits + torch.randn(shape, dtype=torch.float64))]


def plain_rows(logits, other, kind):
    """torch's own formula, row by row."""
    log_p, log_q = log_softmax(logits, -1), log_softmax(other, -1)
    forwards = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    backwards = kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return forwards if kind == "js" else (forwards + backwards) / 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_s_formula_and_autograd(kind, reduction, masked):
    logits, other = pair(2, 5, 11)
    mask = torch.rand(2, 5) < 0.6 if masked else None
    rows = plain_rows(logits, other, kind)
    rows = rows if mask is None else rows * mask
    count = 10 if mask is None else mask.sum()
    expected = {"batchmean": rows.sum() / count, "mean": rows.sum() / count / 11, "sum": rows.sum(), "none": rows}
    loss = consistency_loss(logits, other, kind, mask, reduction)
    torch.testing.assert_close(loss, expected[reduction])
    upstream = torch.randn_like(loss)
    for have, want in zip(
        torch.autograd.grad(loss, (logits, other), upstream),
        torch.autograd.grad(expected[reduction], (logits, other), upstream),
        strict=True,
    ):
        torch.testing.assert_close(have, want)


def test_mean_is_kl_div_s_mean():
    logits, other = pair(4, 9)
    expected = kl_div(log_softmax(other, -1), log_softmax(logits, -1), reduction="mean", log_target=True)
    torch.testing.assert_close(consistency_loss(logits, other, "js", reduction="mean"), expected)


def test_gradient_is_the_closed_form():
    """1/2 [p (d - sum p d) + p - q] with d = log p - log q, by its symmetry for both sides."""
    sides = pair(7, 33)
    gradients = torch.autograd.grad(consistency_loss(*sides, reduction="sum"), sides)
    for (ours, theirs), gradient in zip((sides, sides[::-1]), gradients, strict=True):
        p, q = ours.softmax(-1), theirs.softmax(-1)
        d = p.log() - q.log()
        torch.testing.assert_close(gradient, (p * (d - (p * d).sum(-1, keepdim=True)) + p - q) / 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5,), (3, 1), (0, 4), (2, 1, 2, 3)])
def test_gradcheck(shape, kind):
    for reduction in REDUCTIONS:
        assert torch.autograd.gradcheck(
            lambda a, b, r=reduction: consistency_loss(a, b, kind, reduction=r), tuple(pair(*shape))
        )


def test_second_derivative_raises():
    logits, other = pair(2, 3)
    (grad,) = torch.autograd.grad(consistency_loss(logits, other).square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("V", [1, 2, 63, 2048, 32003])
def test_meets_the_tolerance_rule(V, dtype):
    for case in testing.consistency.cases([(5 if V > 2000 else 64, V)], [dtype]):
        for result in check_case(case, "auto"):
            assert result.ok, result


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_loss_is_wide_and_gradients_are_the_inputs(dtype):
    logits, other = pair(3, 5, dtype=dtype)
    loss = consistency_loss(logits, other)
    loss.backward()
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert logits.grad.dtype == other.grad.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(consistency_loss(logits, other), loss)


@pytest.mark.parametrize("needs", ["logits", "other"])
def test_one_branch_alone_gets_its_gradient(needs):
    logits, other = pair(4, 6)
    both = dict(
        zip(("logits", "other"), torch.autograd.grad(consistency_loss(logits, other), (logits, other)), strict=True)
    )
    sides = {"logits": logits.detach(), "other": other.detach()}
    sides[needs].requires_grad_()
    (gradient,) = torch.autograd.grad(consistency_loss(**sides), sides[needs])
    assert torch.equal(gradient, both[needs])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind, dtype):
    """Logits around +-10^4, far offsets between the sides, one-hot and flat rows."""
    logits = torch.tensor([[1e4, -1e4, 0, 1e4], [-1e4, -1e4, -1e4, -1e4], [1e4, 1e4 - 8, 9984, 0], [0, 0, 0, 1]])
    other = torch.tensor([[1e4, -1e4, 0, 9992], [1e4, 1e4, 1e4, 1e4], [-1e4, -9992, -9984, -1e4], [0, 0, 1, 0]])
    sides = [side.to(dtype).requires_grad_() for side in (logits, other)]
    rows = consistency_loss(*sides, kind, reduction="none")
    plain = plain_rows(*(side.detach().float() for side in sides), kind)
    testing.assert_close(rows, plain, plain_rows(*(side.detach().double() for side in sides), kind), torch.float32)
    assert rows[1] == 0
    for gradient in torch.autograd.grad(rows.sum(), sides):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_entries_hidden_on_both_sides_are_no_part_of_the_vocabulary(backend, kind):
    logits, other = pair(4, 40, dtype=torch.float32)
    used = torch.arange(40) % 3 == 1
    hidden = [side.detach().masked_fill(~used, -torch.inf).requires_grad_() for side in (logits, other)]
    short = [side.detach()[:, used].requires_grad_() for side in (logits, other)]
    with lorasp.use_backend(backend):
        loss, expected = consistency_loss(*hidden, kind), consistency_loss(*short, kind)
    torch.testing.assert_close(loss, expected)
    for have, want in zip(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, short), strict=True):
        assert (have[:, ~used] == 0).all()
        torch.testing.assert_close(have[:, used], want)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_entry_hidden_on_one_side_is_an_infinite_divergence(backend):
    """Of the affected rows alone, and only in the direction whose logarithm is taken."""
    logits, other = (side.detach() for side in pair(3, 20, dtype=torch.float32))
    logits[0, 5] = other[1, 7] = -torch.inf
    sides = [side.requires_grad_() for side in (logits, other)]
    with lorasp.use_backend(backend):
        rows = {kind: consistency_loss(*sides, kind, reduction="none") for kind in KINDS}
    assert rows["kl"].isinf().tolist() == [True, True, False]
    assert rows["js"].isinf().tolist() == [False, True, False]
    for kind in KINDS:
        for gradient in torch.autograd.grad(rows[kind].sum(), sides):
            assert torch.equal(gradient.isnan().all(-1), rows[kind].isinf())
            assert torch.equal(gradient.isnan().any(-1), rows[kind].isinf())


def test_nan_logits_show():
    logits, other = (side.detach() for side in pair(2, 3000, dtype=torch.float32))
    logits[0, 2999] = torch.nan
    assert consistency_loss(logits, other, reduction="none").isnan().tolist() == [True, False]
    assert consistency_loss(other, logits, "js", reduction="none").isnan().tolist() == [True, False]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_masked_rows_add_nothing_whatever_they_hold(backend, poisoned_memory):
    logits, other = (side.detach() for side in pair(2, 3, 50, dtype=torch.float32))
    mask = torch.tensor([[True, False, True], [False, False, True]])
    logits[~mask] = torch.nan
    sides = [side.requires_grad_() for side in (logits, other)]
    with lorasp.use_backend(backend):
        loss = consistency_loss(*sides, mask=mask)
        rows = consistency_loss(*sides, mask=mask, reduction="none")
        expected = consistency_loss(logits[mask], other[mask])
    torch.testing.assert_close(loss, expected)
    assert (rows[~mask] == 0).all()
    for gradient in torch.autograd.grad(loss, sides):
        assert (gradient[~mask] == 0).all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("mask", [torch.zeros(2, dtype=torch.bool), None])
def test_no_row_is_no_loss(mask):
    sides = pair(2 if mask is not None else 0, 3)
    for reduction in ("batchmean", "mean", "sum"):
        loss = consistency_loss(*sides, mask=mask, reduction=reduction)
        assert loss.item() == 0.0
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, sides))


def test_equal_logits_are_exactly_consistent():
    logits, _ = pair(3, 5000, dtype=torch.float32)
    other = logits.detach().clone().requires_grad_()
    loss = consistency_loss(logits, other)
    assert loss.item() == 0.0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (logits, other)))


def test_strided_rows_are_read_where_they_lie():
    logits, other = (side.detach() for side in pair(3, 5, 2100, dtype=torch.float32))
    expected = consistency_loss(logits, other, reduction="none")
    views = (
        lambda t: torch.cat([t, t], 1)[:, :5],  # a shifted language model's logits[:, :-1]
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.cat([t, t], 2)[..., :2100],
        lambda t: torch.stack([t, t], -1)[..., 1],
    )
    for view in views:
        sides = [view(side).requires_grad_() for side in (logits, other)]
        rows = consistency_loss(*sides, reduction="none")
        assert torch.equal(rows, expected)
        gradients = torch.autograd.grad(rows.sum(), sides)
        assert all(gradient.isfinite().all() and gradient.shape == (3, 5, 2100) for gradient in gradients)
        direct = [side.clone().requires_grad_() for side in (logits, other)]
        wanted = torch.autograd.grad(consistency_loss(*direct, reduction="sum"), direct)
        assert all(torch.equal(have, want) for have, want in zip(gradients, wanted, strict=True))


def test_backward_keeps_the_logits_and_24_bytes_a_row():
    logits, other = pair(6, 1000, dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        consistency_loss(logits, other, reduction="none")
    known = {logits.untyped_storage().data_ptr(), other.untyped_storage().data_ptr()}
    extra = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert sum(size for pointer, size in extra.items() if pointer not in known) == 6 * 24
    assert known <= extra.keys()


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 5), min_size=0, max_size=3),
    st.integers(1, 70),
    st.sampled_from([torch.float32, *HALVES]),
    st.sampled_from(KINDS),
    st.integers(0, 2**31),
)
def test_any_shape(lead, V, dtype, kind, seed):
    """The rule on many rows, of which any shape holds the same bits: of one row the reference's own error is luck."""
    torch.manual_seed(seed)
    sides = pair(125, V, dtype=dtype)
    rows = consistency_loss(*sides, kind, reduction="none")
    wide = [side.detach().double() for side in sides]
    with lorasp.use_backend("reference"):
        plain = consistency_loss(*(side.float() for side in wide), kind, reduction="none")
        exact = consistency_loss(*wide, kind, reduction="none")
    testing.assert_close(rows, plain, exact, dtype)
    count = math.prod(lead)
    shaped = consistency_loss(*(side[:count].view(*lead, V) for side in sides), kind, reduction="none")
    assert torch.equal(shaped, rows[:count].view(lead))


def test_bitwise_repeatable():
    case = Case(65, 3000, torch.bfloat16)
    inputs = make_inputs(case)
    first, second = (testing.consistency.run(inputs, case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_fullgraph_without_recompiling_for_new_sizes(kind):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = lambda a, b, mask: consistency_loss(a, b, kind, mask)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for rows in (8, 2, 33):
        sides, mask = pair(2, rows, 19, dtype=torch.float32), torch.rand(2, rows) < 0.7
        loss = compiled(*sides, mask)
        loss.backward()
        assert torch.equal(loss, step(*sides, mask))
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck(backend, kind):
    logits, other = (side.detach() for side in pair(2, 3, 9, dtype=torch.float32))
    mask, drows = torch.rand(2, 3) < 0.5, torch.randn(2, 3)
    torch.library.opcheck(ops.forward_ops[backend], (logits, other, mask, kind))
    _, stats = ops.forward_ops[backend](logits, other, mask, kind)
    for needs in ((True, True), (True, False), (False, True)):
        arguments = drows, logits, other, stats, mask, kind, *needs
        torch.library.opcheck(ops.backward_ops[backend], arguments)
        torch.library.opcheck(ops.replace_ops[backend], arguments)
        wanted = ops.backward_ops[backend](*arguments)
        replaced = logits.clone(), other.clone()
        ops.replace_ops[backend](drows, *replaced, stats, mask, kind, *needs)
        for new, old, gradient, need in zip(replaced, (logits, other), wanted, needs, strict=True):
            assert torch.equal(new, gradient if need else old)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_fake_cuda_metadata(backend):
    with torch._subclasses.FakeTensorMode():
        logits, other = (torch.empty(2, 3, 9, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        rows, stats = ops.forward_ops[backend](logits, other, None, "kl")
        gradients = ops.backward_ops[backend](rows, logits, other, stats, None, "kl", True, False)
        assert [(tuple(t.shape), t.dtype, t.device.type) for t in (rows, stats, *gradients)] == [
            ((2, 3), torch.float32, "cuda"), ((2, 3, 6), torch.float32, "cuda"),
            ((2, 3, 9), torch.bfloat16, "cuda"), ((0,), torch.bfloat16, "cuda"),
        ]  # fmt: skip


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        bad("logits must be a Tensor, got list", TypeError, logits=[1.0]),
        bad("logits must be torch.float64, torch.float32, torch.bfloat16, torch.float16, got torch.int64", TypeError,
            logits=torch.zeros(2, 3, dtype=torch.int64)),
        bad("logits must be (..., V) with V >= 1, got ()", logits=torch.zeros(())),
        bad("logits must be (..., V) with V >= 1, got (2, 0)", logits=torch.zeros(2, 0)),
        bad("other must be (2, 3) like logits, got (3,)", other=torch.zeros(3)),
        bad("other must be torch.float32, got torch.bfloat16", TypeError, other=torch.zeros(2, 3).bfloat16()),
        bad("other must be on cpu like logits, got meta", other=torch.zeros(2, 3, device="meta")),
        bad("mask must be (2,) like the rows of logits, got (2, 3)", mask=torch.ones(2, 3, dtype=torch.bool)),
        bad("mask must be torch.bool, got torch.int64", TypeError, mask=torch.ones(2, dtype=torch.int64)),
        bad("kind must be one of kl, js, got 'tv'", kind="tv"),
        bad("reduction must be one of batchmean, mean, sum, none, got None", reduction=None),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_error(changes, error, message):
    arguments = {"logits": torch.zeros(2, 3), "other": torch.zeros(2, 3)} | changes
    with pytest.raises(error) as caught:
        consistency_loss(**arguments)
    assert str(caught.value).startswith(f"consistency_loss: {message}")


def test_a_forced_backend_never_falls_back():
    logits, other = pair(2, 3)
    for name, reason in lorasp.available_backends().items():
        if reason is None and name != "reference":
            with lorasp.use_backend(name), pytest.raises(ValueError, match=r"does not compute in torch\.float64"):
                consistency_loss(logits, other)


def test_two_points_by_hand():
    """P = (1 - s, s), Q = (s, 1 - s) with s the sigmoid of t: KL(P|Q) = KL(Q|P) = t (2 s - 1)."""
    t = 3.0
    loss = consistency_loss(*torch.tensor([[[0.0, t]], [[t, 0.0]]], dtype=torch.float64))
    assert loss.item() == pytest.approx(t * math.tanh(t / 2))

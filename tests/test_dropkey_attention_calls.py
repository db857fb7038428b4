"""dropkey_attention as torch calls it: raw ops, strides, autocast, torch.compile, checkpointing; and as it refuses."""

import math

import pytest
import torch
from attention_cases import BACKENDS, SMALL, leaves
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention

import lorasp
from lorasp import dropkey_attention, testing
from lorasp.ops import dropkey_attention as ops
from lorasp.testing.dropkey_attention import PATTERNS, Case, make_inputs, run


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, pattern, p):
    inputs = make_inputs(Case(*SMALL, mask="bias"))
    operands = [inputs[name] for name in ("q", "k", "v")]
    rest = (inputs["attn_mask"], torch.tensor(3) if p else None, p, pattern, True, 0.5)
    torch.library.opcheck(ops.forward_ops[backend], (*operands, *rest))
    o, lse = ops.forward_ops[backend](*operands, *rest)
    for needs in ((True, True, True, True), (True, False, False, False), (False, False, True, False)):
        torch.library.opcheck(ops.backward_ops[backend], (inputs["do"], *operands, o, lse, *rest, *needs))


@pytest.mark.parametrize("layout", ["BSHD", "fused qkv", "expanded keys", "last dimension strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(layout, dtype):
    case = Case(2, 3, 3, 20, 20, 16, 16, dtype, dropout_p=0.2)
    inputs = make_inputs(case)
    if layout == "expanded keys":
        inputs["k"] = inputs["k"][:, :1].expand(-1, 3, -1, -1)
    views = dict(inputs)
    for number, name in enumerate("qkv"):
        t = inputs[name]
        if layout == "BSHD":
            views[name] = t.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "fused qkv":
            views[name] = torch.stack([t.transpose(1, 2)] * 3, 2)[:, :, number].transpose(1, 2)
        elif layout == "last dimension strided":
            views[name] = t.mT.contiguous().mT
        else:
            inputs[name] = t.contiguous()
    have, want = run(views, case), run(inputs, case)
    assert all(torch.equal(have[name], want[name]) for name in want)
    assert have["o"].transpose(1, 2).is_contiguous()
    for name in "qkv":
        assert have[f"d{name}"].stride() == torch.empty_like(views[name]).stride()


def test_three_dimensions_are_one_batch():
    (q, k, v), _ = leaves(Case(1, 4, 2, 6, 9, 8, 5))
    call = lambda *a, **kw: dropkey_attention(*a, dropout_p=0.3, enable_gqa=True, seed=3, **kw)  # noqa: E731
    mask = torch.rand(4, 6, 9) < 0.8
    assert torch.equal(call(q[0], k[0], v[0], attn_mask=mask), call(q, k, v, attn_mask=mask[None])[0])


@pytest.mark.parametrize(("B", "Sq", "Sk"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty_inputs(B, Sq, Sk):
    q, k, v = (torch.randn(B, 2, S, 8, requires_grad=True) for S in (Sq, Sk, Sk))
    o = dropkey_attention(q, k, v, dropout_p=0.5, seed=1)
    assert o.shape == (B, 2, Sq, 8)
    assert (o == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(o.sum(), (q, k, v)))


def test_second_derivatives_raise():
    (q, k, v), _ = leaves(Case(*SMALL, torch.float64))
    (grad,) = torch.autograd.grad(dropkey_attention(q, k, v, enable_gqa=True).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_same_seed_same_bits_and_manual_seed_reproduces():
    (q, k, v), _ = leaves(Case(1, 2, 2, 32, 32, 16, 16))
    draw = lambda seed=None: dropkey_attention(q, k, v, dropout_p=0.5, seed=seed)  # noqa: E731
    assert torch.equal(draw(3), draw(torch.tensor(3)))
    assert not torch.equal(draw(3), draw(4))
    torch.manual_seed(0)
    first = draw()
    torch.manual_seed(0)
    assert torch.equal(first, draw())
    assert not torch.equal(first, draw())


@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_what_sdpa_computes_in(q_dtype):
    (q, k, v), inputs = leaves(Case(1, 2, 2, 16, 16, 8, 8, mask="bias"))
    q = q.detach().to(q_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        o = dropkey_attention(q, k, v, inputs["attn_mask"], dropout_p=0.2, seed=1)
        assert o.dtype == scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        assert dropkey_attention(*(t.double() for t in (q, k, v))).dtype == torch.float64
    o.sum().backward()
    assert [t.grad.dtype for t in (q, k, v)] == [q_dtype, torch.float32, torch.float32]
    halves = [t.detach().bfloat16() for t in (q, k, v)]
    assert torch.equal(o, dropkey_attention(*halves, inputs["attn_mask"], dropout_p=0.2, seed=1))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_fullgraph_without_recompiling_for_new_sizes(pattern, backend):
    torch._dynamo.reset()
    seed = torch.tensor(5)

    def step(q, k, v, mask):
        return dropkey_attention(q, k, v, mask, dropout_p=0.3, pattern=pattern, seed=seed)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    with lorasp.use_backend(backend):
        for S in (10, 20, 33):
            (q, k, v), _ = leaves(Case(2, 3, 3, S, S + 2, 8, 8))
            mask = torch.rand(2, 1, 1, S + 2) < 0.8
            have = torch.autograd.grad(compiled(q, k, v, mask).sum(), (q, k, v))
            want = torch.autograd.grad(step(q, k, v, mask).sum(), (q, k, v))
            assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
            counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


def test_compiles_with_one_tensor_as_query_key_and_value():
    torch._dynamo.reset()
    x = torch.randn(1, 2, 6, 8, requires_grad=True)

    def step(x):
        return dropkey_attention(x, x, x, dropout_p=0.3, seed=5)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    have, want = (torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, step))
    torch.testing.assert_close(have, want)


def test_inductor_gives_the_same_function():
    torch._dynamo.reset()
    case = Case(1, 2, 1, 12, 14, 8, 8, dropout_p=0.3, is_causal=True, mask="bias")
    inputs = make_inputs(case)
    want = run(inputs, case)
    for name, have in run(inputs, case, torch.compile(dropkey_attention, fullgraph=True, dynamic=False)).items():
        testing.assert_close(have, want[name], want[name].double(), torch.float32, name)


def test_checkpointing_redraws_the_same_keys():
    from torch.utils.checkpoint import checkpoint

    operands, _ = leaves(Case(1, 2, 2, 16, 16, 8, 8))
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(1)
        call = lambda *a: dropkey_attention(*a, dropout_p=0.5).tanh()  # noqa: E731
        o = checkpoint(call, *operands, use_reentrant=False) if wrapped else call(*operands)
        gradients.append(torch.autograd.grad(o.sum(), operands))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_fake_cuda_metadata(backend):
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(2, 10, 4, 16, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        k, v = (torch.empty(2, 2, 12, d, device="cuda", dtype=torch.bfloat16) for d in (16, 24))
        bias = torch.empty(1, 4, 10, 12, device="cuda")
        rest = (bias, torch.empty((), device="cuda", dtype=torch.int64), 0.1, "column", False, 1.0)
        o, lse = ops.forward_ops[backend](q, k, v, *rest)
        gradients = ops.backward_ops[backend](o, q, k, v, o, lse, *rest, True, True, True, True)
        assert [(tuple(t.shape), t.dtype, t.device.type) for t in (o, lse, *gradients)] == [
            ((2, 4, 10, 24), torch.bfloat16, "cuda"),
            ((2, 4, 10), torch.float32, "cuda"),
            ((2, 4, 10, 16), torch.bfloat16, "cuda"),
            ((2, 2, 12, 16), torch.bfloat16, "cuda"),
            ((2, 2, 12, 24), torch.bfloat16, "cuda"),
            ((1, 4, 10, 12), torch.float32, "cuda"),
        ]
        assert o.transpose(1, 2).is_contiguous()
        assert gradients[0].stride() == q.stride()


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message)


T = torch.zeros


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        bad("q must be a Tensor, got list", TypeError, q=[1.0]),
        bad("q must be torch.float64, torch.float32, torch.bfloat16, torch.float16, got torch.int64", TypeError,
            q=T(2, 4, 6, 8, dtype=torch.int64)),
        bad("k must be torch.float32 like q, got torch.float64", TypeError, k=T(2, 4, 9, 8, dtype=torch.float64)),
        bad("v must be on cpu like q, got meta", v=T(2, 4, 9, 5, device="meta")),
        bad("q must be (B, H, Sq, D) or (H, Sq, D) with D in 1..256, got (6, 8)", q=T(6, 8)),
        bad("q must be (B, H, Sq, D) or (H, Sq, D) with D in 1..256, got (2, 4, 6, 300)", q=T(2, 4, 6, 300)),
        bad("k must be (2, Hkv, Sk, 8) with Hkv = 4, got (2, 2, 9, 8)", k=T(2, 2, 9, 8)),
        bad("k must be (2, Hkv, Sk, 8) with Hkv = a divisor of 4, got (2, 3, 9, 8)", k=T(2, 3, 9, 8), enable_gqa=True),
        bad("k must be (2, Hkv, Sk, 8) with Hkv = 4, got (2, 4, 9, 7)", k=T(2, 4, 9, 7)),
        bad("v must be (2, 4, 9, Dv) with Dv in 1..256, got (2, 4, 10, 8)", v=T(2, 4, 10, 8)),
        bad("attn_mask must be broadcastable to (2, 4, 6, 9), got (6, 8)", attn_mask=T(6, 8)),
        bad("attn_mask must be broadcastable to (2, 4, 6, 9), got (1, 2, 4, 6, 9)", attn_mask=T(1, 2, 4, 6, 9)),
        bad("attn_mask must be broadcastable to (2, 4, 6, 9), got (2, 9); a padding mask (B, Sk) goes in as "
            "mask[:, None, None, :]", attn_mask=T(2, 9)),
        bad("attn_mask must be torch.bool or torch.float32, got torch.int64", TypeError,
            attn_mask=T(6, 9, dtype=torch.int64)),
        bad("attn_mask must be a Tensor, got list", TypeError, attn_mask=[True]),
        bad("pattern must be one of column, element, span, got 'row'", pattern="row"),
        bad("dropout_p must be in [0, 1), got 1.0", dropout_p=1.0),
        bad("dropout_p must be in [0, 1), got -0.1", dropout_p=-0.1),
        bad("dropout_p must be below 1 - 2^-17", dropout_p=0.999999),
        bad("scale must be a finite number, got inf", scale=math.inf),
        bad("seed must be an int or a 0-d int64 tensor, got float", TypeError, seed=1.5, dropout_p=0.1),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_error(changes, error, message):
    arguments = {"q": T(2, 4, 6, 8), "k": T(2, 4, 9, 8), "v": T(2, 4, 9, 5)} | changes
    with pytest.raises(error) as caught:
        dropkey_attention(**arguments)
    assert str(caught.value).startswith(f"dropkey_attention: {message}")


def test_a_forced_backend_never_falls_back():
    (q, k, v), _ = leaves(Case(*SMALL, torch.float64))
    for name, reason in lorasp.available_backends().items():
        if reason is None and name != "reference":
            with lorasp.use_backend(name), pytest.raises(ValueError, match=r"does not compute in torch\.float64"):
                dropkey_attention(q, k, v, enable_gqa=True)

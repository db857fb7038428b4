"""dropkey_attention's public function: what it computes, what it saves, how it fails; on the backend `auto` chooses.

Backend against reference over the full grid: test_cpp_dropkey_attention.py, test_triton_dropkey_attention.py.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention

import lorasp
from lorasp import dropkey_attention, rng, testing
from lorasp.ops import dropkey_attention as ops
from lorasp.ops import registry
from lorasp.testing.dropkey_attention import MASKS, PATTERNS, Case, check_case, make_inputs, run

BACKENDS = [name for name in ("reference", "cpp", "triton") if registry.unsupported(name, "cpu", torch.float32) is None]
SMALL = (2, 4, 2, 6, 9, 8, 5)  # B, H, Hkv, Sq, Sk, D, Dv


def leaves(case):
    inputs = make_inputs(case)
    return [inputs[name].requires_grad_() for name in "qkv"], inputs


def keep(pattern, p, seed, B, H, Sq, Sk):
    """The drop decisions of design: what each logit of (B, H, Sq, Sk) asks the generator."""
    if pattern == "column":
        mask = rng.keep_mask(seed, (B, H, Sk), p, rng.PURPOSE_DROPKEY).unsqueeze(2)
    elif pattern == "span":
        mask = rng.span_keep_mask(seed, (B, H, Sk), p, rng.PURPOSE_DROPKEY).unsqueeze(2)
    else:
        mask = rng.keep_mask(seed, (B, H, Sq, Sk), p, rng.PURPOSE_DROPKEY)
    return mask.expand(B, H, Sq, Sk)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("mask", ["none", "bool", "bias"])
def test_dropkey_s_gradient_formula(pattern, mask, is_causal):
    """dz = G - w' rowsum(G) with G = w' o dp and w' the softmax over what is left."""
    case = Case(*SMALL, torch.float64, pattern, 0.4, is_causal, mask, scale=0.7)
    inputs = make_inputs(case)
    q, k, v, bias, do = (inputs[name] for name in ("q", "k", "v", "attn_mask", "do"))
    keys, values = (t.repeat_interleave(2, 1) for t in (k, v))
    visible = keep(pattern, 0.4, case.seed + 1, 2, 4, 6, 9)
    visible = visible & (torch.ones(6, 9).tril().bool() if is_causal else True) & (bias if mask == "bool" else True)
    z = q @ keys.mT * 0.7 + (bias if mask == "bias" else 0)
    weights = torch.exp(z) * visible
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    G = weights * (do @ values.mT)
    dz = G - weights * G.sum(-1, keepdim=True)
    expected = {
        "o": weights @ values,
        "dq": dz @ keys * 0.7,
        "dk": (dz.mT @ q * 0.7).unflatten(1, (2, 2)).sum(2),
        "dv": (weights.mT @ do).unflatten(1, (2, 2)).sum(2),
        "dattn_mask": dz.sum(0, keepdim=True),
    }
    for name, have in run(inputs, case).items():
        torch.testing.assert_close(have, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_without_drops_it_is_scaled_dot_product_attention(mask, is_causal, dtype):
    case = Case(2, 4, 2, 33, 40, 16, 16, dtype, is_causal=is_causal, mask=mask)
    inputs = make_inputs(case)
    visible = torch.ones(33, 40, dtype=torch.bool).tril() if is_causal else None

    def sdpa(q, k, v, attn_mask, is_causal, enable_gqa, scale, **unused):
        if is_causal and attn_mask is None:
            attn_mask = visible
        elif is_causal:
            hidden = False if attn_mask.dtype == torch.bool else float("-inf")
            attn_mask = attn_mask.masked_fill(~visible, hidden)
        return scaled_dot_product_attention(q, k, v, attn_mask, enable_gqa=enable_gqa, scale=scale)

    reference64 = run(testing.dropkey_attention.in_float64(inputs), case, sdpa)
    reference = run(inputs, case, sdpa)
    for name, have in run(inputs, case).items():
        if dtype == torch.float64:
            torch.testing.assert_close(have, reference64[name])
        else:
            testing.assert_close(have, reference[name], reference64[name], dtype, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_every_backend_drops_the_same_logits(backend, pattern, p):
    """With q = 0 and v = I, o is the softmax itself: uniform over what was kept, exactly 0 elsewhere."""
    B, H, Sq, Sk = 2, 3, 5, 77
    zeros, eye = torch.zeros(B, H, Sq, 16), torch.eye(Sk).expand(B, H, Sk, Sk)
    with lorasp.use_backend(backend):
        o = dropkey_attention(zeros, torch.ones(B, H, Sk, 16), eye, dropout_p=p, pattern=pattern, seed=-7)
    kept = keep(pattern, p, -7, B, H, Sq, Sk)
    assert torch.equal(o != 0, kept)
    torch.testing.assert_close(o, kept / kept.sum(-1, keepdim=True).clamp_min(1))


@pytest.mark.parametrize("pattern", ["column", "span"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropped_keys_get_exactly_zero(pattern, dtype):
    case = Case(2, 3, 3, 40, 50, 16, 16, dtype, pattern, 0.3)
    gradients = run(make_inputs(case), case)
    dropped = ~keep(pattern, 0.3, case.seed + 1, 2, 3, 1, 50)[:, :, 0]
    assert dropped.any()
    for name in ("dk", "dv"):
        assert torch.equal((gradients[name] == 0).all(-1), dropped), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["column", "element", "bool", "min", "-inf"])
def test_a_query_that_sees_nothing_gives_zeros_and_passes_no_gradient(how, dtype):
    """Causal row 0 whose only key is dropped; rows of a mask that are hidden whole."""
    B, H, S = 1, 8, 20
    (q, k, v), inputs = leaves(Case(B, H, H, S, S, 8, 8, dtype))
    visible = torch.ones(B, H, S, S, dtype=torch.bool).tril()
    arguments = {"is_causal": True}
    if how in PATTERNS:
        arguments |= {"dropout_p": 0.5, "pattern": how, "seed": 2}
        visible &= keep(how, 0.5, 2, B, H, S, S)
    else:
        mask = torch.rand(1, 1, S, S) < 0.8
        mask[:, :, 3:7] = False
        visible &= mask
        value = {"bool": None, "min": torch.finfo(dtype).min, "-inf": float("-inf")}[how]
        arguments["attn_mask"] = (
            mask if value is None else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, value)
        )
    blind = ~visible.any(-1)
    assert blind.any()
    o = dropkey_attention(q, k, v, **arguments)
    gradients = torch.autograd.grad(o, (q, k, v), inputs["do"])
    assert (o[blind] == 0).all()
    assert (gradients[0][blind] == 0).all()
    assert all(t.isfinite().all() for t in (o, *gradients))
    again = torch.autograd.grad(
        o := dropkey_attention(q, k, v, **arguments), (q, k, v), inputs["do"] * ~blind[..., None]
    )
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True)), "a blind row's do must not matter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finfo_min_hides_as_false_does(dtype):
    case = Case(2, 3, 3, 24, 30, 16, 16, dtype, dropout_p=0.2, is_causal=True, mask="min")
    inputs = make_inputs(case)
    as_bool = dict(inputs, attn_mask=inputs["attn_mask"] == 0)
    for additive, boolean in zip(run(inputs, case).values(), run(as_bool, case).values(), strict=True):
        testing.assert_close(additive, boolean, boolean.double(), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(40, 90), (1, 90)])
def test_nan_in_a_mask_shows(shape, backend):
    """(1 - mask) * -inf is NaN where it should show: that must not pass for a mask that hides everything."""
    q, k, v = torch.ones(1, 2, 40, 16), torch.ones(1, 2, 90, 16), torch.ones(1, 2, 90, 16)
    open_keys = torch.zeros(shape)
    open_keys[:, 70:] = 1
    for p in (0.0, 0.3):
        with lorasp.use_backend(backend):
            assert dropkey_attention(q, k, v, (1 - open_keys) * -torch.inf, dropout_p=p, seed=1).isnan().all()


@pytest.mark.parametrize(("pattern", "is_causal"), [("column", True), ("element", False), ("span", False)])
def test_gradcheck(pattern, is_causal):
    (q, k, v), inputs = leaves(Case(1, 2, 1, 3, 4, 2, 2, torch.float64, mask="bias"))
    bias = inputs["attn_mask"].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, v, bias: dropkey_attention(
            q, k, v, bias, dropout_p=0.3, pattern=pattern, is_causal=is_causal, enable_gqa=True, seed=5
        ),
        (q, k, v, bias),
    )


@pytest.mark.parametrize("shape", [(), (9,), (6, 9), (1, 1, 1, 9), (2, 1, 1, 9), (1, 4, 6, 1), (4, 1, 9), (2, 4, 6, 9)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_bias_of_any_broadcastable_shape_gets_its_gradient(shape, dtype):
    case = Case(*SMALL, dtype, dropout_p=0.2)
    (q, k, v), inputs = leaves(case)
    bias = torch.randn(shape, dtype=dtype, requires_grad=True)
    full = bias.detach().expand(2, 4, 6, 9).clone().requires_grad_()
    call = lambda mask: dropkey_attention(q, k, v, mask, dropout_p=0.2, enable_gqa=True, seed=5)  # noqa: E731
    have = torch.autograd.grad(call(bias), (bias, q, k, v), inputs["do"])
    want = torch.autograd.grad(call(full), (full, q, k, v), inputs["do"])
    torch.testing.assert_close(have[0], want[0].sum_to_size(shape))
    for a, b in zip(have[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b)


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


@pytest.mark.parametrize("needs", ["q", "k", "v", "qk", "kv", "qv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_is_needed_is_computed(needs, dtype, monkeypatch):
    case = Case(*SMALL, dtype, dropout_p=0.2, needs=needs)
    everything = run(make_inputs(case), Case(*SMALL, dtype, dropout_p=0.2))
    asked = []
    backend = registry.choose("dropkey_attention", "cpu", dtype)
    real = ops.backward_ops[backend]
    monkeypatch.setitem(ops.backward_ops, backend, lambda *a: asked.append(a[-4:]) or real(*a))
    for name, have in run(make_inputs(case), case).items():
        assert torch.equal(have, everything[name])
    assert asked == [("q" in needs, "k" in needs, "v" in needs, False)]


def test_saves_nothing_but_operands_output_and_statistics():
    case = Case(2, 4, 4, 64, 64, 16, 16, mask="bias")
    (q, k, v), inputs = leaves(case)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        o = dropkey_attention(q, k, v, inputs["attn_mask"], dropout_p=0.1, seed=torch.tensor(3))
    own = [t.untyped_storage() for t in (q, k, v, inputs["attn_mask"], o)]
    rest = {pointer: size for pointer, size in saved.items() if pointer not in {s.data_ptr() for s in own}}
    assert sorted(rest.values()) == [8, 4 * 2 * 4 * 64]  # the seed and lse


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


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    groups=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]),
    Sq=st.integers(4, 70),
    Sk=st.integers(8, 150),
    D=st.integers(2, 70),
    Dv=st.integers(2, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    pattern=st.sampled_from(PATTERNS),
    p=st.sampled_from([0.0, 0.1, 0.4]),
    is_causal=st.booleans(),
    mask=st.sampled_from(MASKS),
    seed=st.integers(0, 1000),
)
def test_any_shape_meets_the_rule(B, groups, Sq, Sk, D, Dv, dtype, pattern, p, is_causal, mask, seed):
    case = Case(B, *groups, Sq, Sk, D, Dv, dtype, pattern, p, is_causal, mask, seed=seed)
    results = check_case(case, "auto")
    assert all(r.ok for r in results), (case, [r for r in results if not r.ok])

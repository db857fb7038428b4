"""dropkey_attention's public function: what it computes and what it saves, on the backend `auto` chooses.

Backend against reference over the full grid: test_cpp_dropkey_attention.py, test_triton_dropkey_attention.py.
"""

import pytest
import torch
from attention_cases import BACKENDS, SMALL, leaves
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import lorasp
from lorasp import dropkey_attention, rng, testing
from lorasp.ops import dropkey_attention as ops
from lorasp.ops import registry
from lorasp.testing.dropkey_attention import MASKS, PATTERNS, Case, check_case, make_inputs, run


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


@settings(max_examples=30)
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

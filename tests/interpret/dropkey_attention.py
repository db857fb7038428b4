"""dropkey_attention's Triton kernels, interpreted on CPU tensors, against the fp64 reference.

Run by test_triton_dropkey_attention.py, in a process of its own, as lora_linear.py here is.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from lorasp import rng
from lorasp.reference import dropkey_attention as reference
from lorasp.testing import assert_close
from lorasp.testing.dropkey_attention import Case, check_case
from lorasp.testing.rule import bound, error
from lorasp.triton_kernels import dropkey_attention as kernels
from lorasp.triton_kernels import launch

pytestmark = pytest.mark.usefixtures("poisoned_memory")

F32, F16 = torch.float32, torch.float16
SEED = -(2**40) - 17
PATTERNS = ("column", "element", "span")
# (B, H, Hkv, Sq, Sk, D, Dv): odd and tiny sizes, every relation of Sq and Sk, several tiles in both directions.
SMALL = Case(1, 2, 2, 17, 24, 16, 16)
GROUPED = Case(2, 4, 2, 20, 33, 16, 32)
WIDE = Case(1, 2, 1, 40, 19, 20, 7)
ROW = Case(5, 3, 3, 1, 40, 32, 16)
TINY = Case(1, 1, 1, 3, 1, 1, 1)
CASES = (
    SMALL,
    replace(SMALL, dtype=F16, is_causal=True, mask="padding"),
    replace(SMALL, dropout_p=0.3, mask="bias", is_causal=True),
    replace(SMALL, dropout_p=0.3, pattern="element", mask="bias32", dtype=F16),
    replace(SMALL, dropout_p=0.3, pattern="element", mask="min", is_causal=True, dtype=F16),
    replace(SMALL, dropout_p=0.9, is_causal=True, needs="k"),
    replace(GROUPED, dropout_p=0.3, is_causal=True),
    replace(GROUPED, dropout_p=0.3, pattern="span", mask="padding", dtype=F16),
    replace(GROUPED, mask="bool", is_causal=True),
    replace(WIDE, dropout_p=0.3, pattern="element", is_causal=True),
    replace(WIDE, dropout_p=0.5, mask="min", is_causal=True),
    replace(WIDE, mask="bias", dtype=F16, needs="v"),
    replace(SMALL, dropout_p=0.1, scale=-1.0, dtype=F16),  # the largest logit is that of the smallest product
    replace(WIDE, dropout_p=0.5, pattern="span", is_causal=True, needs="q"),
    replace(ROW, dropout_p=0.1, mask="padding"),
    replace(ROW, dropout_p=0.1, pattern="span", dtype=F16),
    replace(TINY, dropout_p=0.5),
    replace(TINY, dropout_p=0.5, pattern="span", is_causal=True, mask="bias"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case):
    for result in check_case(case, "triton"):
        assert result.ok, result


def tensors(B=1, H=2, Hkv=1, Sq=20, Sk=24, D=16, DV=16, dtype=F32):
    """q, k, v and do, q and k stored as models store them: heads behind tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, Sq, H, D), (B, Sk, Hkv, D), (B, Sk, Hkv, DV), (B, Sq, H, DV)
    return [torch.randn(*shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def run(module, q, k, v, do, mask=None, p=0.0, pattern="column", causal=False, need_dmask=False, need=True):
    """(o, lse, dq, dk, dv, dmask) of the launchers or of the reference."""
    arguments = mask, torch.tensor(SEED) if p else None, p, pattern, causal, 0.3
    o, lse = module.forward(q, k, v, *arguments)
    return o, lse, *module.backward(do, q, k, v, o, lse, *arguments, need, need, need, need_dmask)


@pytest.mark.parametrize("Sk", [1, 40, 67])
@pytest.mark.parametrize(("pattern", "p"), [("column", 0.3), ("column", 0.99), ("span", 0.3), ("span", 0.01)])
def test_key_lists(pattern, p, Sk):
    """Kept keys in order, then the dropped ones; rank counts the kept keys before each."""
    B, H = 2, 3
    q, k, v, _ = tensors(B, H, H, Sk=Sk, D=1, DV=1)
    call = kernels.Call.of(q, k, v, None, torch.tensor(SEED), p, pattern, False, 1.0)
    if pattern == "span" and Sk == 1:
        assert call.index is call.rank is None
        return
    keep = (rng.keep_mask if pattern == "column" else rng.span_keep_mask)(SEED, (B * H, Sk), p, rng.PURPOSE_DROPKEY)
    assert torch.equal(call.rank, torch.nn.functional.pad(keep.cumsum(1), (1, 0)).int())
    for keys, kept in zip(call.index, keep, strict=True):
        assert keys[: kept.sum()].tolist() == kept.nonzero().flatten().tolist()
        assert sorted(keys.tolist()) == list(range(Sk))


@pytest.mark.parametrize("Sk", [24, 21])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_drop_decisions_are_the_definition(pattern, Sk):
    """Equal logits and v = I show in o which keys each query attends to, do = I shows it in dv."""
    B, H, Sq, p = 2, 1, 20, 0.4
    q, k = torch.zeros(B, H, Sq, 8), torch.zeros(B, H, Sk, 8)
    v, do = torch.eye(Sk, Sq).expand(B, H, Sk, Sq), torch.eye(Sq).expand(B, H, Sq, Sq)
    o, _, _, _, dv, _ = run(kernels, q, k, v, do, p=p, pattern=pattern)
    keep = reference.keep_mask(torch.tensor(SEED), (B, H, Sq, Sk), p, pattern).expand(B, H, Sq, Sk)
    assert torch.equal(o != 0, keep[..., :Sq])
    assert torch.equal(dv != 0, keep.mT)


@pytest.mark.parametrize("pattern", ["column", "span"])
def test_dropped_keys_get_exactly_zero(pattern):
    q, k, v, do = tensors(H=2, Hkv=2)
    _, _, _, dk, dv, _ = run(kernels, q, k, v, do, p=0.5, pattern=pattern)
    keep = reference.keep_mask(torch.tensor(SEED), (1, 2, 20, 24), 0.5, pattern)[:, :, 0]
    for gradient in (dk, dv):
        assert torch.equal(gradient.ne(0).any(-1), keep)


@pytest.mark.parametrize(("p", "pattern"), [(0.0, "column"), (0.9, "column"), (0.9, "element")])
def test_queries_that_see_nothing(p, pattern):
    q, k, v, do = tensors()
    mask = torch.zeros(1, 1, 20, 24).index_fill(2, torch.tensor([0, 19]), torch.finfo(F32).min)
    o, lse, *gradients = run(kernels, q, k, v, do, mask, p, pattern, True, True)
    seen = reference.visible(q, k, mask, torch.tensor(SEED), p, pattern, True)
    empty = ~seen.any(-1)
    assert empty[:, :, [0, 19]].all()
    assert torch.equal(lse == float("-inf"), empty)
    assert o[empty].count_nonzero() == gradients[0][empty].count_nonzero() == 0
    assert gradients[3].masked_select(~seen.any(1, keepdim=True)).count_nonzero() == 0
    assert all(gradient.isfinite().all() for gradient in (o, *gradients))


@pytest.mark.parametrize("broadcast", list(itertools.product((False, True), repeat=4)), ids=str)
def test_additive_masks_of_every_shape(broadcast):
    """Few tiles share the sum of a mask that broadcasts; the gradient has the mask's own shape."""
    B, H, Sq, Sk = 2, 2, 18, 10
    inputs = tensors(B, H, 1, Sq, Sk)
    shape = [1 if one else size for one, size in zip(broadcast, (B, H, Sq, Sk), strict=True)]
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    options = {
        "p": 0.3,
        "pattern": ("column", "span")[sum(broadcast) % 2],
        "causal": broadcast[0],
        "need": False,
        "need_dmask": True,
    }
    actual = run(kernels, *inputs, mask, **options)[5]
    want = run(reference, *inputs, mask, **options)[5]
    want64 = run(reference, *(t.double() for t in (*inputs, mask)), **options)[5]
    assert actual.shape == mask.shape
    if not broadcast[3]:
        assert_close(actual, want, want64, F32, "dmask")
        return
    # A softmax does not feel what all keys get alike: the gradient is 0, and its rounding, against the reference's
    # rounding, is luck. Each of the n terms has what the rule allows a term; their sum may have n times that.
    terms = mask.expand(B, H, Sq, Sk).contiguous()
    one = run(reference, *inputs, terms, **options)[5]
    one64 = run(reference, *(t.double() for t in (*inputs, terms)), **options)[5]
    assert error(actual, want64) <= terms.numel() // mask.numel() * bound(one, one64, F32)


@pytest.mark.parametrize("wide", [False, True])
def test_any_strides(wide, monkeypatch):
    """Slices, expanded heads and a last dimension that is not contiguous; gradients are laid out as empty_like."""
    monkeypatch.setattr(kernels.prepared, "_spans_wide", lambda mask: wide)
    q, k, v, do = tensors(H=4, Hkv=4)
    q = torch.cat([q, q], 3)[..., ::2]
    k = k.mT.contiguous().mT
    v = v[:, :1].expand(1, 4, 24, 16)
    do = do[..., :1].expand(1, 4, 20, 16)
    mask = torch.rand(1, 1, 24, 20, generator=torch.Generator().manual_seed(0)).gt(0.3).mT
    actual = run(kernels, q, k, v, do, mask, 0.3)
    want = run(reference, q, k, v, do, mask, 0.3)
    want64 = run(reference, *(t.double() for t in (q, k, v, do)), mask, 0.3)
    for name, got, same, exact in zip(("o", "lse", "dq", "dk", "dv"), actual, want, want64, strict=False):
        assert got.stride() == same.stride(), name
        assert_close(got, same, exact, F32, name)


def test_key_gradients_are_summed_in_one_program_or_from_partials(monkeypatch):
    """One program serves a key head's query heads where they share keys and there are programs enough."""
    heads = []

    def spy(kernel, grid, arguments, *rest, **options):
        heads.extend([arguments["heads"]] if "heads" in arguments else [])
        launch.run(kernel, grid, arguments, *rest, **options)

    monkeypatch.setattr(launch, "_interceptor", spy)
    for batch, p in ((1, 0.0), (4, 0.0), (4, 0.3)):
        run(kernels, *tensors(batch, 4, 2, 5, 10), p=p)
    assert heads == [1, 2, 1]


@pytest.mark.parametrize("empty", ["B", "Sq", "Sk"])
def test_nothing_to_do(empty):
    q, k, v, do = tensors(**{empty: 0})
    mask = torch.zeros(1, 1, 1, k.shape[2])
    o, lse, *gradients = run(kernels, q, k, v, do, mask, 0.3, need_dmask=True)
    assert o.shape == do.shape
    assert o.count_nonzero() == 0
    assert lse.eq(float("-inf")).all()
    for gradient, tensor in zip(gradients, (q, k, v, mask), strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_refused_dtypes(dtype):
    with pytest.raises(ValueError, match=f"dropkey_attention: q must be .* got {dtype}|.*got bfloat16"):
        run(kernels, *tensors(dtype=dtype))

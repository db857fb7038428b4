"""What the public function does not show of lora_linear's Triton kernels; run interpreted, as lora_linear.py is."""

import pytest
import torch
import triton
import triton.language as tl
from keep_bits import keep_at

from lorasp import rng
from lorasp.reference import lora_linear as reference
from lorasp.testing import assert_close, make_inputs
from lorasp.triton_kernels import launch, philox, tuning
from lorasp.triton_kernels import lora_linear as kernels
from lorasp.triton_kernels import lora_linear_products as products

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PLANS = ("addmm", "fused", "onepass")
OUTPUTS = ("y", "xa", "dx", "dlora_A", "dlora_B")


def run(inputs, plan="fused", p=0.0, seed=5, member=2, scale=1.5, masks=True, needs=(True, True, True)):
    """Forward and backward through the launchers: outputs by name."""
    i = dict(inputs)
    seed = torch.tensor(seed) if p else None
    mask_A, mask_B = (i["mask_A"], i["mask_B"]) if masks else (None, None)
    y, xa = kernels.forward(
        i["x"], i["weight"], i["bias"], i["lora_A"], i["lora_B"], seed, scale, p, member, plan
    )  # fmt: skip
    grads = kernels.backward(
        i["dy"], i["x"], i["weight"], i["lora_A"], i["lora_B"], xa, seed, mask_A, mask_B, scale, p, member, *needs, plan
    )
    return dict(zip(OUTPUTS, (y, xa, *grads), strict=True))


def expected(inputs, dtype, p=0.0, seed=5, member=2, scale=1.5, masks=True):
    """The reference's outputs in `dtype`."""
    i = {k: v.to(dtype) if v is not None and v.is_floating_point() else v for k, v in inputs.items()}
    seed = torch.tensor(seed) if p else None
    mask_A, mask_B = (i["mask_A"], i["mask_B"]) if masks else (None, None)
    y, xa = reference.forward(i["x"], i["weight"], i["bias"], i["lora_A"], i["lora_B"], seed, scale, p, member)
    grads = reference.backward(
        i["dy"], i["x"], i["weight"], i["lora_A"], i["lora_B"], xa, seed, mask_A, mask_B, scale, p, member,
        True, True, True,
    )  # fmt: skip
    return dict(zip(OUTPUTS, (y, xa, *grads), strict=True))


def check(actual, inputs, dtype, **options):
    want, want64 = expected(inputs, dtype, **options), expected(inputs, torch.float64, **options)
    for name in OUTPUTS:
        assert_close(actual[name], want[name], want64[name], dtype, name)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that run, in order."""
    names = []

    def spy(kernel, *arguments, **options):
        names.append(kernel.fn.__name__.removeprefix("_lora_linear_").removesuffix("_kernel"))
        launch.run(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "_interceptor", spy)
    return names


@triton.jit
def _store_mask_kernel(
    out_ptr, seed_ptr, start_m, start_k, K, threshold, member,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_M)
    offs_m = start_m + rows.to(tl.int64)
    keep = philox.keep_mask(tl.load(seed_ptr), offs_m, start_k, K, threshold, member, BLOCK_K, ALIGNED)
    tl.store(out_ptr + rows[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :], keep.to(tl.int8))


def tile_of_mask(seed, start_m, start_k, K, p, member, aligned):
    out = torch.empty((4, 32), dtype=torch.int8)
    _store_mask_kernel[(1,)](out, torch.tensor(seed), start_m, start_k, K, rng.threshold(p), member, 4, 32, aligned)
    return out.bool()


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize(("seed", "member"), [(0, 0), (-1, 1), (2**63 - 1, 7), (-(2**63), 2**31 - 1)])
@pytest.mark.parametrize(("K", "aligned"), [(64, True), (64, False), (65, False), (33, False)])
def test_mask_bits_are_the_definition(K, aligned, seed, member, p):
    want = rng.keep_mask(seed, (9, K), p, rng.PURPOSE_LORA_DROPOUT, member)
    for start_m, start_k in ((0, 0), (5, 0), (3, 32)):
        columns = min(32, K - start_k)
        got = tile_of_mask(seed, start_m, start_k, K, p, member, aligned)
        assert torch.equal(got[:, :columns], want[start_m : start_m + 4, start_k : start_k + columns])


@pytest.mark.parametrize(("K", "aligned"), [(2**20, True), (2**20 + 1, False)])
def test_mask_counters_have_64_bits(K, aligned):
    start_m = 2**17 + 3  # elements beyond 2^37: their counters, an eighth of them, do not fit 32 bits
    index = (start_m + torch.arange(4))[:, None] * K + torch.arange(32)
    assert torch.equal(tile_of_mask(11, start_m, 0, K, 0.5, 3, aligned), keep_at(index, 11, 0.5, member=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("plan", PLANS)
def test_repeatable_to_the_bit(plan, dtype):
    inputs = make_inputs(65, 72, 63, 3, dtype, masks=True)
    first, second = run(inputs, plan, p=0.1), run(inputs, plan, p=0.1)
    for name in OUTPUTS:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("K", [64, 63])
def test_nothing_leaks_from_dropped_inputs(plan, K):
    inputs = make_inputs(40, K, 40, 3, torch.float32)
    dropped = ~rng.keep_mask(5, (40, K), 0.5, rng.PURPOSE_LORA_DROPOUT, 2)
    inputs["weight"] = torch.zeros_like(inputs["weight"])
    clean = run(inputs, plan, p=0.5)
    inputs["x"] = inputs["x"].masked_fill(dropped, float("nan"))
    dirty = run(inputs, plan, p=0.5)
    for name in ("xa", "dx", "dlora_A", "dlora_B"):
        assert torch.equal(clean[name], dirty[name]), name


@pytest.mark.parametrize("parts", [1, 3])
def test_masked_gradients_are_zero_even_from_nan(parts, monkeypatch):
    monkeypatch.setattr(tuning, "split", lambda *_: parts)
    inputs = make_inputs(70, 66, 34, 3, torch.float32, masks=True)
    inputs["dy"][0, :] = float("nan")
    out = run(inputs)
    assert out["dlora_A"][~inputs["mask_A"]].count_nonzero() == 0
    assert out["dlora_B"][~inputs["mask_B"]].count_nonzero() == 0
    assert out["dlora_A"][inputs["mask_A"]].isnan().all()


@pytest.mark.parametrize(("R", "one_pass"), [(3, True), (3, False), (40, False)])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_split_sums(parts, R, one_pass, launched, monkeypatch):
    monkeypatch.setattr(tuning, "split", lambda *_: parts)
    monkeypatch.setattr(tuning, "one_pass_over_dy", lambda *_: one_pass)
    inputs = make_inputs(97, 70, 65, R, torch.float32, masks=True)
    check(run(inputs, p=0.1), inputs, torch.float32, p=0.1)
    assert ("project_outer" in launched) == one_pass
    assert ("reduce" in launched) == (parts > 1 or one_pass)


@pytest.mark.parametrize("parts", [1, 31, 33, 70])
def test_reduction_takes_any_number_of_parts(parts):
    generator = torch.Generator().manual_seed(0)
    partials = torch.randn(parts, 9, 13, generator=generator)
    mask = torch.rand(9, 13, generator=generator).lt(0.5).view(torch.uint8)
    for dtype in (torch.float32, torch.float16):
        total = products.reduce(partials, torch.empty(9, 13, dtype=dtype), mask)
        want = torch.where(mask.bool(), partials.sum(0), 0).to(dtype)
        assert_close(total, want, torch.where(mask.bool(), partials.double().sum(0), 0), dtype)


@pytest.mark.parametrize(
    ("plan", "sizes", "dtype", "kernel"),
    [
        ("addmm", (64, 64, 64), torch.float16, "accumulate"),
        ("fused", (64, 64, 64), torch.float16, "gemm_tma"),
        ("fused", (64, 63, 64), torch.float16, "gemm"),
        ("fused", (64, 64, 63), torch.float16, "gemm"),
        ("fused", (64, 64, 64), torch.float32, "gemm"),
        ("onepass", (64, 64, 64), torch.float16, "onepass_tma"),
        ("onepass", (64, 63, 64), torch.float16, "onepass"),
        ("onepass", (64, 64, 64), torch.float32, "onepass"),
    ],
)
def test_plan_decides_the_kernel(plan, sizes, dtype, kernel, launched):
    inputs = make_inputs(*sizes, 8, dtype)
    kernels.forward(
        inputs["x"], inputs["weight"], None, inputs["lora_A"], inputs["lora_B"], None, 1.0, 0.0, 0, plan
    )  # fmt: skip
    assert kernel in launched
    assert len(launched) == (1 if plan == "onepass" else 2)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_strides(plan, dtype):
    inputs = make_inputs(34, 64, 48, 8, dtype, masks=True)

    def spread(tensor):
        """The same values with gaps between rows."""
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 16), float("nan"), dtype=tensor.dtype)
        wide[:, : tensor.shape[1]] = tensor
        return wide[:, : tensor.shape[1]]

    def columns(tensor):
        """The same values, column after column in memory."""
        return tensor.t().contiguous().t()

    def gaps(tensor):
        """The same values with gaps between the entries of a row, and rows in reverse order of memory."""
        wide = torch.stack((tensor, tensor), -1).flatten(1)
        return wide[:, ::2]

    for layout in (spread, columns, gaps):
        names = (
            ("x", "weight", "dy") if layout is spread else ("x", "weight", "dy", "lora_A", "lora_B", "mask_A", "mask_B")
        )
        laid = inputs | {name: layout(inputs[name]) for name in names}
        check(run(laid, plan, p=0.1), inputs, dtype, p=0.1)
    row = inputs["dy"][:1]
    check(run(inputs | {"dy": row.expand(34, 48)}, plan), inputs | {"dy": row.repeat(34, 1)}, dtype)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_what_is_needed(needs, launched):
    inputs = make_inputs(33, 40, 24, 3, torch.float32)
    full = run(inputs)
    launched.clear()
    got = run(inputs, needs=needs)
    for name, needed in zip(OUTPUTS[2:], needs, strict=True):
        assert torch.equal(got[name], full[name]) if needed else got[name].shape == (0,)
    assert ("outer" in launched) == (needs[1] or needs[2])


def test_no_weight_no_seed_no_x_where_only_dB_is_needed():
    inputs = make_inputs(33, 40, 24, 3, torch.float32)
    want = run(inputs, p=0.5)
    _, _, dB = kernels.backward(
        inputs["dy"], None, torch.empty(0, 0), inputs["lora_A"], inputs["lora_B"], want["xa"], None, None, None, 1.5,
        0.5, 2, False, False, True, "auto",
    )  # fmt: skip
    assert torch.equal(dB, want["dlora_B"])


def test_dropout_that_rounds_to_nothing_is_none():
    inputs = make_inputs(9, 16, 8, 3, torch.float32)
    with_p, without = run(inputs, p=1e-6), run(inputs)
    assert all(torch.equal(with_p[name], without[name]) for name in OUTPUTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": "best"}, "plan must be one of auto, addmm, fused, onepass, got 'best'"),
        ({"R": 65, "plan": "onepass"}, "plan onepass takes R <= 64, got 65"),
        ({"dtype": torch.float64}, "x must be float32, bfloat16 or float16"),
        ({"dtype": torch.bfloat16}, "x must be float32 or float16 under TRITON_INTERPRET=1"),
    ],
)
def test_refusals(change, message):
    inputs = make_inputs(4, 8, 8, change.get("R", 2), change.get("dtype", torch.float32))
    with pytest.raises(ValueError, match=f"lora_linear: {message}"):
        run(inputs, change.get("plan", "auto"))

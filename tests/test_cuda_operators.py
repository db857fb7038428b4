"""Backend cuda: the operators of csrc/cuda/*.cu, from their checks to the last kernel, on the emulator or a GPU."""

from dataclasses import replace

import pytest
import torch
from cuda_emulation.backend import require_gpu_build
from keep_bits import keep_at

import lorasp
from lorasp import rng, testing
from lorasp.functional import lora_linear
from lorasp.ops import lora_linear as ops
from lorasp.ops import registry
from lorasp.testing import Case, check_case, make_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_meets_the_rule(case, device="cpu"):
    wrong = [result for result in check_case(case, "cuda", "auto", device) if not result.ok]
    assert not wrong, wrong


CASES = {
    "plain": {},
    "one row": {"M": 1},
    "no rows": {"M": 0, "dropout_p": 0.1, "masks": True},
    "one column": {"K": 1, "N": 1},
    "LoRA-FA with dropout": {"freeze_A": True, "dropout_p": 0.1, "bias": False},
    "no dx": {"need_dx": False, "dropout_p": 0.5},
    "dropout and masks": {"masks": True, "dropout_p": 0.5, "R": 24},
    "zero weight": {"zero_weight": True, "bias": False, "R": 48},
    "g and dB in one pass": {"M": 300, "N": 40, "R": 1, "dropout_p": 0.1},
    "aligned rows": {"K": 128, "N": 64, "R": 16, "dropout_p": 0.1},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_linear(emulated, dtype, changes):
    assert_meets_the_rule(replace(Case(67, 75, 33, 5, dtype), **changes))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_fp32_masters(emulated, dtype):
    assert_meets_the_rule(Case(67, 75, 33, 5, dtype, masters=True, masks=True, dropout_p=0.1))
    i = make_inputs(67, 75, 33, 5, dtype, masters=True)
    arguments = (i["x"], i["weight"], None, i["lora_A"], i["lora_B"], None, 1.0, 0.0, 0, "auto", None)
    _, xa = ops.forward_ops["cuda"](*arguments)
    for grad in ops.backward_ops["cuda"](
        i["dy"], i["x"], i["weight"], i["lora_A"], i["lora_B"], xa, None, None, None, 1.0, 0.0, 0, False, True, True,
        "auto", None,
    )[1:]:  # fmt: skip
        assert grad.dtype == torch.float32
        assert not torch.equal(grad, grad.to(dtype).float())


@pytest.mark.parametrize("share", ["small", "large", "cancelled"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_low_rank_share_is_rounded_first(emulated, dtype, share):
    """The frozen product is added onto 2^-10 and 2^10 of itself, and onto what takes all but 2^-10 of it away."""
    M, K, N, R, scale = 130, 96, 80, 8, {"small": 2.0**-10, "large": 2.0**10, "cancelled": 1.0}[share]
    for seed in range(3):
        i = make_inputs(M, K, N, R, dtype, bias=False, seed=seed)
        if share == "cancelled":
            i["weight"] = (i["weight"] * 2.0**-10 - i["lora_B"] @ i["lora_A"]).to(dtype)
        operands = [i[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
        rest = (None, scale, 0.0, 0, "auto", None)
        exact = [None if t is None else t.double() for t in operands]
        y, xa = ops.forward_ops["cuda"](*operands, *rest)
        reference, reference_xa = ops.forward_ops["reference"](*operands, *rest)
        exact_y, exact_xa = ops.forward_ops["reference"](*exact, *rest)
        testing.assert_close(y, reference, exact_y, dtype, "y")
        _, weight, _, A, B = operands
        tail = (None, None, None, scale, 0.0, 0, True, False, False, "auto", None)
        dx, _, _ = ops.backward_ops["cuda"](i["dy"], None, weight, A, B, xa, *tail)
        reference, _, _ = ops.backward_ops["reference"](i["dy"], None, weight, A, B, reference_xa, *tail)
        exact_dx, _, _ = ops.backward_ops["reference"](
            i["dy"].double(), None, exact[1], *exact[3:], exact_xa, *tail
        )  # fmt: skip
        testing.assert_close(dx, reference, exact_dx, dtype, "dx")


def test_operands_of_any_strides(emulated):
    case = Case(70, 96, 65, 8, torch.bfloat16, dropout_p=0.1, masks=True)
    inputs = make_inputs(70, 96, 65, 8, torch.bfloat16, masks=True)

    def spread(tensor):
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 5), torch.nan, dtype=tensor.dtype)
        wide[:, : tensor.shape[1]] = tensor
        return wide[:, : tensor.shape[1]]

    def columns(tensor):
        return tensor.t().contiguous().t()

    matrices = ("x", "weight", "lora_A", "lora_B", "dy", "mask_A", "mask_B")
    layouts = (
        {name: spread(inputs[name]) for name in ("x", "weight", "dy")},
        {name: columns(inputs[name]) for name in matrices},
        {"dy": inputs["dy"][:1].expand(70, 65)},
    )
    for layout in layouts:
        views = inputs | layout
        with lorasp.use_backend("cuda"):
            actual = testing.lora_linear.run(views, case)
        with lorasp.use_backend("reference"):
            expected = testing.lora_linear.run(views, case)
        for name in expected:
            testing.assert_close(actual[name], expected[name], expected[name].double(), torch.bfloat16, name)


def test_autocast_and_grad_mode_stay_outside(emulated):
    """fp32 operands are multiplied in fp32 inside a bf16 autocast, and no graph grows out of the frozen product."""
    i = make_inputs(20, 32, 24, 4, torch.float32)
    operands = [i[name].requires_grad_() for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = torch.ops.lorasp.lora_linear_fwd_cuda(*operands, None, 1.0, 0.0, 0, "auto", None)
    assert torch.is_grad_enabled()
    exact, _ = ops.forward_ops["reference"](*(t.detach().double() for t in operands), None, 1.0, 0.0, 0, "auto", None)
    assert (y - exact).abs().max() < 1e-3 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_opcheck(emulated, p, masters):
    """Masters: also that a frozen factor's empty gradient has dy's dtype."""
    i = make_inputs(6, 16, 12, 4, torch.bfloat16 if masters else torch.float32, masters=masters)
    seed = torch.tensor(3) if p else None
    forward = (*(i[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")), seed, 0.5, p, 0, "auto", None)
    torch.library.opcheck(ops.forward_ops["cuda"], forward)
    _, xa = ops.forward_ops["cuda"](*forward)
    for need_dA, need_dB in ((True, True), (False, True), (True, False)) if masters else ((True, True),):
        backward = (i["dy"], i["x"], i["weight"], i["lora_A"], i["lora_B"], xa, seed, None, None, 0.5, p, 0, True,
                    need_dA, need_dB, "auto", None)  # fmt: skip
        torch.library.opcheck(ops.backward_ops["cuda"], backward)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("keys", [0, 1, 300])
def test_key_lists(emulated, rows, keys):
    seed = torch.tensor(-5)
    index, rank = torch.ops.lorasp.dropkey_attention_keys_cuda(seed, rows, keys, 0.3)
    keep = rng.keep_mask(seed, (rows, keys), 0.3, rng.PURPOSE_DROPKEY)
    assert torch.equal(rank, torch.nn.functional.pad(keep.cumsum(1), (1, 0)).int())
    for row in range(rows):
        assert torch.equal(index[row, : rank[row, -1]], keep[row].nonzero().squeeze(1).int())
        assert torch.equal(index[row].sort().values, torch.arange(keys).int())


SIZES = r"lora_A must be \(R, K\) and lora_B \(N, R\) with R, K, N >= 1, "


def bad_calls():
    i = make_inputs(4, 8, 6, 2, torch.float32, masks=True)
    operands = ("x", "weight", "bias", "lora_A", "lora_B")
    good = {name: i[name] for name in operands}
    good |= {"seed": None, "scale": 1.0, "dropout_p": 0.0, "member": 0, "plan": "auto", "packed": None}
    for changes, message in (
        ({"weight": torch.zeros(6, 9)}, r"weight must be \(6, 8\), got \(6, 9\)"),
        ({"lora_A": torch.zeros(8)}, "x, lora_A and lora_B must be 2-d, got 2, 1 and 2"),
        ({"lora_A": torch.zeros(0, 8), "lora_B": torch.zeros(6, 0)}, SIZES + r"got \(0, 8\) and \(6, 0\)"),
        (
            {"x": torch.zeros(4, 0), "weight": torch.zeros(6, 0), "lora_A": torch.zeros(2, 0)},
            SIZES + r"got \(2, 0\) and \(6, 2\)",
        ),
        (
            {"weight": torch.zeros(0, 8), "bias": None, "lora_B": torch.zeros(0, 2)},
            SIZES + r"got \(2, 8\) and \(0, 2\)",
        ),
        ({"lora_B": i["lora_B"].bfloat16()}, "lora_B must have dtype Float, got BFloat16"),
        ({"plan": "fused"}, "plan must be auto or addmm for backend cuda, got fused"),
        ({"packed": torch.zeros(1)}, "packed must be None for backend cuda"),
        ({"dropout_p": 0.5}, "seed must be a 0-d int64 tensor when dropout_p > 0, got None"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1"),
        ({name: good[name].double() for name in operands}, "x must be float32, bfloat16 or float16"),
    ):
        yield pytest.param(good | changes, message, id=message)


@pytest.mark.parametrize(("arguments", "message"), list(bad_calls()))
def test_the_raw_op_refuses_what_does_not_fit(emulated, arguments, message):
    with pytest.raises(RuntimeError, match=f"lora_linear: {message}"):
        torch.ops.lorasp.lora_linear_fwd_cuda(*arguments.values())


@pytest.mark.parametrize(("K", "N", "R"), [(8, 6, 0), (0, 6, 2), (8, 0, 2)])
def test_the_raw_backward_refuses_empty_factors(emulated, K, N, R):
    x, dy, weight, A, B, xa = (torch.zeros(s) for s in ((4, K), (4, N), (N, K), (R, K), (N, R), (4, R)))
    with pytest.raises(RuntimeError, match=rf"lora_linear: {SIZES}got \({R}, {K}\) and \({N}, {R}\)"):
        ops.backward_ops["cuda"](dy, x, weight, A, B, xa, None, None, None, 1.0, 0.0, 0, True, True, True, "auto", None)


def test_other_plans_and_operators_are_refused(emulated):
    i = make_inputs(4, 8, 6, 2, torch.float32)
    operands = [i[name] for name in ("x", "weight", "lora_A", "lora_B")]
    with lorasp.use_backend("cuda"):
        with pytest.raises(ValueError, match="plan must be auto or addmm for backend cuda, got 'fused'"):
            lora_linear(*operands, plan="fused")
        with pytest.raises(ValueError, match=r"dropkey_attention: .* cuda has no kernels for this operator"):
            lorasp.dropkey_attention(*[torch.zeros(1, 1, 4, 16)] * 3)
    with lorasp.use_backend("cuda", "onepass"), pytest.raises(ValueError, match="got 'onepass'"):
        lora_linear(*operands)


def test_auto_takes_cuda_where_triton_is_not_installed(emulated, monkeypatch):
    monkeypatch.setattr(registry, "_triton_installed", True)
    assert registry.choose("lora_linear", "cuda", torch.bfloat16) == "triton"
    monkeypatch.setattr(registry, "_triton_installed", False)
    assert registry.choose("lora_linear", "cuda", torch.bfloat16) == "cuda"
    assert registry.choose("hidden_cut", "cuda", torch.bfloat16) == "cuda"
    assert registry.choose("dropkey_attention", "cuda", torch.bfloat16) == "reference"


class OnGpu:
    """As much of a CUDA tensor of n elements as the choice looks at."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self, n):
        self.numel = lambda: n


def test_auto_launches_from_cpp_where_a_gpu_would_wait_for_the_host(emulated, monkeypatch):
    monkeypatch.setattr(registry, "_triton_installed", True)
    monkeypatch.setattr(registry, "_cuda_missing", None)
    monkeypatch.setattr(registry, "_capability_obstacle", lambda device: None)

    def chosen(x, out_features, plan="auto"):
        waits = registry.waits_for_host(x, out_features, plan)
        return registry.choose("lora_linear_group", "cuda", torch.bfloat16, waits)

    assert chosen(OnGpu(2048 * 4096), 4096) == "cuda"
    assert chosen(OnGpu(2048 * 4096 + 1), 4096) == "triton"
    assert chosen(OnGpu(8), 8, "fused") == "triton"
    assert chosen(torch.empty(8), 8) == "triton"
    with monkeypatch.context() as turing:
        turing.setattr(registry, "_capability_obstacle", {0: "needs compute capability 8.0, got 7.5"}.get)
        assert chosen(OnGpu(8), 8) == "triton"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen(OnGpu(8), 8) == "triton"
    monkeypatch.undo()
    monkeypatch.setattr(registry, "_triton_installed", True)
    assert not registry.waits_for_host(OnGpu(8), 8, "auto")  # not built
    assert registry.choose("lora_linear_group", "cuda", torch.bfloat16, waits=True) != "cuda"


def test_absence_is_explained(monkeypatch):
    monkeypatch.setattr(registry, "_cuda_missing", None)
    monkeypatch.setattr(registry, "_capability_obstacle", registry._capability_obstacle.__wrapped__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert registry.available_backends()["cuda"] == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert registry.available_backends()["cuda"] == "needs compute capability 8.0, got 7.5"
    assert registry.unsupported("cuda", "cpu", torch.float32) == "cuda runs on cuda, not on cpu"
    assert registry.unsupported("cuda", "cuda", torch.float64) == "cuda does not compute in torch.float64"


GPU_SHAPES = (
    (4096, 4096, 4096, 16),
    (1000, 1536, 8960, 64),
    (1, 4096, 4096, 8),
    (129, 1000, 63, 24),
    (63, 129, 1000, 3),
)
GPU_VARIANTS = (
    {},
    {"dropout_p": 0.1, "masks": True},
    {"dropout_p": 0.5, "freeze_A": True, "bias": False, "zero_weight": True},
    {"masters": True, "need_dx": False},
)


@pytest.fixture
def built():
    require_gpu_build()


@pytest.mark.gpu
@pytest.mark.parametrize("variant", GPU_VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu(built, shape, dtype, variant, poisoned_memory):
    assert_meets_the_rule(Case(*shape, dtype=dtype, **variant), "cuda")


@pytest.mark.gpu
def test_gpu_repeats_to_the_bit(built):
    case = Case(4096, 4096, 2048, 16, torch.bfloat16, dropout_p=0.1)
    inputs = make_inputs(4096, 4096, 2048, 16, torch.bfloat16, "cuda")
    with lorasp.use_backend("cuda"):
        first, second = testing.lora_linear.run(inputs, case), testing.lora_linear.run(inputs, case)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "N"), [(4096, 64), (64, 4096)])
def test_gpu_beyond_2_to_31_elements(built, K, N):
    """Only the last rows hold anything, and they lie beyond 2^31 elements: every output is known from them."""
    M, live, R, p, seed = 2**31 // 4096 + 1024, 64, 8, 0.5, torch.tensor(9, device="cuda")
    needed = 2 * M * (2 * K + 2 * N) + 2**32
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    tail = make_inputs(live, K, N, R, torch.bfloat16, "cuda")
    x, dy = (torch.zeros(M, size, dtype=torch.bfloat16, device="cuda") for size in (K, N))
    x[-live:], dy[-live:] = tail["x"], tail["dy"]
    weight, bias, A, B = (tail[name] for name in ("weight", "bias", "lora_A", "lora_B"))
    y, xa = ops.forward_ops["cuda"](x, weight, bias, A, B, seed, 2.0, p, 0, "auto", None)
    dx, dA, dB = ops.backward_ops["cuda"](
        dy, x, weight, A, B, xa, seed, None, None, 2.0, p, 0, True, True, True, "auto", None
    )

    index = (M - live + torch.arange(live, device="cuda"))[:, None] * K + torch.arange(K, device="cuda")
    keep = keep_at(index, seed, p)

    def formula(dtype):
        X, W, b, a, B_, DY = (t.to(dtype) for t in (tail["x"], weight, bias, A, B, tail["dy"]))
        dropped = torch.where(keep, X, 0)
        XA, G = (2.0 * rng.rescale(p)) * dropped @ a.t(), (2.0 * rng.rescale(p)) * DY @ B_
        return X @ W.t() + b + XA @ B_.t(), torch.where(keep, G @ a, 0) + DY @ W, G.t() @ dropped, DY.t() @ XA

    actual = y[-live:], dx[-live:], dA, dB
    for got, want, exact in zip(actual, formula(torch.bfloat16), formula(torch.float64), strict=True):
        testing.assert_close(got, want, exact, torch.bfloat16)
    assert y[:-live].eq(bias).all()
    assert dx[:-live].count_nonzero() == 0


@pytest.mark.gpu
def test_gpu_graph_reads_its_seed_on_the_device(built):
    """The captured step draws a new mask whenever the seed tensor changes: nothing was read on the host."""
    i = make_inputs(256, 512, 256, 16, torch.bfloat16, "cuda", bias=False)
    seed, operands = torch.tensor(1, device="cuda"), [i[n] for n in ("x", "weight", "bias", "lora_A", "lora_B")]
    forward = ops.forward_ops["cuda"]
    want = {v: forward(*operands, torch.tensor(v, device="cuda"), 1.0, 0.5, 0, "auto", None) for v in (1, 2)}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, xa = forward(*operands, seed, 1.0, 0.5, 0, "auto", None)
    for value in (2, 1):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(y, want[value][0])
        assert torch.equal(xa, want[value][1])
    assert not torch.equal(want[1][1], want[2][1])


@pytest.mark.gpu
def test_gpu_key_lists(built):
    seed = torch.tensor(-5, device="cuda")
    index, rank = torch.ops.lorasp.dropkey_attention_keys_cuda(seed, 64, 16384, 0.1)
    keep = rng.keep_mask(seed, (64, 16384), 0.1, rng.PURPOSE_DROPKEY)
    assert torch.equal(rank[:, 1:], keep.cumsum(1).int())
    assert torch.equal(index.sort(1).values, torch.arange(16384, device="cuda").int().expand(64, 16384))
    for row in range(64):
        assert torch.equal(index[row, : rank[row, -1]], keep[row].nonzero().squeeze(1).int())

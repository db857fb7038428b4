"""lora_linear on Triton: interpreted everywhere, on hardware where there is a GPU; the choice of plans and tiles."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interpreter import run_interpreted
from keep_bits import keep_at

pytest.importorskip("triton", reason="triton is not installed")

from lorasp import rng
from lorasp.ops import lora_linear as ops
from lorasp.testing import Case, assert_close, check_case, make_inputs
from lorasp.triton_kernels import launch, tuning
from lorasp.triton_kernels import lora_linear as kernels

TESTS = Path(__file__).parent
PLANS = ("addmm", "fused", "onepass")


@pytest.mark.parametrize("files", ["interpret/lora_linear.py", "interpret/lora_linear_kernels.py", "test_ops.py"])
def test_interpreted(files):
    run_interpreted(files)


ROW = {
    "direction": "forward", "dtype": "bfloat16", "dropout": False, "N": 4096, "K": 4096, "R": 16, "M": 8192,
    "plan": "fused",
}  # fmt: skip


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Install a table for a device named `Test GPU 7` and return its target."""

    def install(rows, **changes):
        content = {
            "device": "Test GPU 7", "measured": True, "provenance": {},
            "default": {"forward": "addmm", "backward": "addmm"}, "rows": rows,
        } | changes  # fmt: skip
        (tmp_path / "test_gpu_7.json").write_text(json.dumps(content))
        monkeypatch.setattr(tuning, "_CONFIG_DIR", tmp_path)
        return replace(tuning.target_of_arch(90), name="Test GPU 7")

    tuning.forget_tables()
    yield install
    tuning.forget_tables()


def choose(target, plan="auto", direction="forward", M=8192, N=4096, K=4096, R=16, dtype=torch.bfloat16, dropout=False):
    return tuning.select_plan(plan, direction, M, N, K, R, dtype, dropout, target)


def test_unmeasured_devices_run_the_safe_default():
    unknown = tuning.Target("Some GPU of 2031", arch=150, sm_count=300, shared_memory=65536)
    assert choose(unknown).name == choose(unknown, direction="backward").name == "addmm"
    assert not tuning.load_table(unknown.name)["measured"]
    assert tuning.plan_table(torch.device("cpu"))["file"] == "default.json"
    for plan in PLANS:
        assert choose(unknown, plan).name == plan
    assert choose(unknown, "onepass", direction="backward").name == "fused"


def test_shipped_tables_claim_no_measurement_they_do_not_have():
    files = sorted((TESTS.parent / "triton_kernels" / "configs").glob("*.json"))
    assert files
    for file in files:
        content = json.loads(file.read_text())
        assert content["measured"] == bool(content["rows"])
        assert not content["measured"] or {"torch", "triton", "commit"} <= content["provenance"].keys()


def test_nearest_row_decides(table):
    tiles = {"block_m": 128, "block_c": 128, "block_d": 64, "num_warps": 8, "num_stages": 4, "tma": True}
    target = table(
        [ROW, ROW | {"M": 64, "plan": "addmm"}, ROW | {"N": 14336, "R": 8, "plan": "onepass", "gemm": tiles}]
    )
    assert choose(target).name == "fused"
    assert choose(target, M=100).name == "addmm"
    assert choose(target, M=1000).name == "fused"
    assert choose(target, N=11008, R=8) == tuning.Plan("onepass", tuning.GemmConfig(**tiles))
    assert choose(target, "fused", N=14336, R=8).gemm is None


@pytest.mark.parametrize(
    "call",
    [{"N": 1024}, {"K": 16384}, {"R": 64}, {"dropout": True}, {"dtype": torch.float16}, {"direction": "backward"}],
)
def test_far_rows_do_not_speak(table, call):
    assert choose(table([ROW]), **call) == tuning.Plan("addmm")


def test_onepass_rows_do_not_speak_for_ranks_it_cannot_take(table):
    target = table([ROW | {"R": 64, "plan": "onepass"}])
    assert choose(target, R=64).name == "onepass"
    assert choose(target, R=96) == tuning.Plan("addmm")
    assert choose(target, "onepass", R=96).name == "onepass"  # forced: the launcher says why it refuses


def test_a_plan_with_tiles_runs_with_these():
    target, tiles = tuning.target_of_arch(90), tuning.GemmConfig(64, 64, 32, num_warps=4, num_stages=2)
    plan = tuning.Plan("onepass", tiles)
    assert choose(target, plan) is plan
    assert choose(target, plan, direction="backward") == tuning.Plan("fused", tiles)


TILES = {"block_m": 128, "block_c": 128, "block_d": 64, "num_warps": 8, "num_stages": 4}


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([ROW | {"plan": "best"}], {}, "row 0: plan must be one of addmm, fused, onepass, got 'best'"),
        ([ROW, ROW | {"dtype": "fp16"}], {}, "row 1: dtype must be one of bfloat16, float16, float32, got 'fp16'"),
        ([ROW | {"M": 0}], {}, "row 0: M must be a whole number above 0, got 0"),
        ([ROW | {"K": True}], {}, "row 0: K must be a whole number above 0, got True"),
        ([ROW | {"ratio": 1.0}], {}, r"row 0 must have no other fields than .*gemm, got \['ratio'\]"),
        ([{"plan": "addmm"}], {}, "row 0 must have direction, dtype, dropout, N, K, R, M, plan, got 'plan'"),
        ([ROW | {"gemm": TILES | {"block_k": 64}}], {}, r"row 0: gemm must have no other fields .*got \['block_k'\]"),
        ([ROW | {"gemm": {"block_m": 64}}], {}, "row 0: gemm must have block_m, block_c, .*got 'block_m'"),
        ([ROW | {"gemm": TILES | {"tma": 1}}], {}, "row 0: gemm tma must be true or false, got 1"),
        ([], {"default": {"forward": "addmm"}}, "default must have forward, backward, got 'forward'"),
        ([], {"default": {"forward": "addmm", "backward": "auto"}}, "default backward must be one of addmm, .*'auto'"),
        ({}, {}, "rows must be a list, got {}"),
    ],
)
def test_malformed_table(table, rows, changes, message):
    with pytest.raises(ValueError, match=rf"test_gpu_7\.json: {message}"):
        choose(table(rows, **changes))


def test_a_table_that_is_no_json(table, tmp_path):
    target = table([])
    (tmp_path / "test_gpu_7.json").write_text("{")
    with pytest.raises(ValueError, match=r"test_gpu_7\.json: must be JSON"):
        choose(target)


@pytest.mark.parametrize("M", [1, 64, 8192])
@pytest.mark.parametrize("R", [1, 8, 16, 24, 64, 512])
@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120, 130])
def test_tiles_exist_for_every_architecture(arch, R, M):
    target = tuning.target_of_arch(arch)
    for dtype in (torch.float32, torch.bfloat16):
        for aligned in (True, False):
            for choice in (tuning.skinny_config, tuning.one_pass_config, tuning.accumulate_config):
                config = choice(target, dtype, M, R, aligned=aligned)
                assert min(config.block_m, config.block_r) >= 16
                assert config.num_stages >= 1
            config = tuning.gemm_config(target, dtype, M, tma=aligned and dtype.itemsize == 2, aligned=aligned)
            operands = (config.block_m + config.block_c) * config.block_d * dtype.itemsize
            assert operands * config.num_stages <= target.shared_memory


def test_one_pass_over_dy_is_a_matter_of_bytes():
    M, N, itemsize, block_m = 8192, 4096, 2, 128
    for R in (8, 16, 24, 32, 64):
        partials = 2 * 4 * (M // block_m) * N * R  # written, then read
        assert tuning.one_pass_over_dy(M, N, R, itemsize, block_m) == (partials < M * N * itemsize)


GPU_SHAPES = (
    (4096, 4096, 4096, 16),
    (1000, 1536, 8960, 64),
    (2048, 4096, 1024, 8),
    (1, 4096, 4096, 8),
    (33, 1024, 2048, 128),
    (129, 1000, 63, 24),
    (63, 129, 1000, 3),
)
GPU_VARIANTS = (
    {},
    {"dropout_p": 0.1, "masks": True},
    {"dropout_p": 0.5, "freeze_A": True, "bias": False, "zero_weight": True},
    {"masters": True, "need_dx": False},
)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", GPU_VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_gpu(plan, shape, dtype, variant, poisoned_memory):
    if plan == "onepass" and shape[-1] > 64:
        pytest.skip("onepass takes R <= 64")
    for result in check_case(Case(*shape, dtype=dtype, **variant), "triton", plan, "cuda"):
        assert result.ok, result


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS)
def test_gpu_repeats_to_the_bit(plan):
    inputs = make_inputs(4096, 4096, 2048, 16, torch.bfloat16, "cuda")
    seed = torch.tensor(3, device="cuda")

    def step():
        y, xa = kernels.forward(
            inputs["x"], inputs["weight"], inputs["bias"], inputs["lora_A"], inputs["lora_B"], seed, 2.0, 0.1, 0, plan
        )
        gradients = kernels.backward(
            inputs["dy"], inputs["x"], inputs["weight"], inputs["lora_A"], inputs["lora_B"], xa, seed, None, None, 2.0,
            0.1, 0, True, True, True, plan,
        )  # fmt: skip
        return y, xa, *gradients

    for first, second in zip(step(), step(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [64, 63])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpu_mask_bits_are_the_definition(K, dtype):
    M, p, seed = 1000, 0.3, -(2**40) - 17
    eye = torch.eye(K, device="cuda", dtype=dtype)
    ones = torch.ones(M, K, device="cuda", dtype=dtype)
    _, xa = kernels.forward(ones, eye, None, eye, eye, torch.tensor(seed, device="cuda"), 1.0, p, 5, "addmm")
    assert torch.equal(xa.cpu() != 0, rng.keep_mask(seed, (M, K), p, rng.PURPOSE_LORA_DROPOUT, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("K", "N"), [(4096, 64), (64, 4096)])
def test_gpu_beyond_2_to_31_elements(plan, K, N):
    """Only the last rows hold anything, and they lie beyond 2^31 elements: every output is known from them."""
    M, live, R, p, seed = 2**31 // 4096 + 1024, 64, 8, 0.5, torch.tensor(9, device="cuda")
    needed = 2 * M * (2 * K + 2 * N) + 2**32
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    tail = make_inputs(live, K, N, R, torch.bfloat16, "cuda")
    x, dy = (torch.zeros(M, size, dtype=torch.bfloat16, device="cuda") for size in (K, N))
    x[-live:], dy[-live:] = tail["x"], tail["dy"]
    weights = [tail[name] for name in ("weight", "bias", "lora_A", "lora_B")]
    y, xa = kernels.forward(x, *weights, seed, 2.0, p, 0, plan)
    dx, dA, dB = kernels.backward(
        dy, x, weights[0], *weights[2:], xa, seed, None, None, 2.0, p, 0, True, True, True, plan
    )

    index = (M - live + torch.arange(live, device="cuda"))[:, None] * K + torch.arange(K, device="cuda")
    keep = keep_at(index, seed, p)

    def formula(dtype):
        X, W, bias, A, B, DY = (t.to(dtype) for t in (tail["x"], *weights, tail["dy"]))
        dropped = torch.where(keep, X, 0)
        XA = (2.0 * rng.rescale(p)) * dropped @ A.t()
        G = (2.0 * rng.rescale(p)) * DY @ B
        return X @ W.t() + bias + XA @ B.t(), torch.where(keep, G @ A, 0) + DY @ W, G.t() @ dropped, DY.t() @ XA

    actual = y[-live:], dx[-live:], dA, dB
    for got, want, exact in zip(actual, formula(torch.bfloat16), formula(torch.float64), strict=True):
        assert_close(got, want, exact, torch.bfloat16)
    assert y[:-live].eq(tail["bias"]).all()
    assert dx[:-live].count_nonzero() == 0


@pytest.mark.gpu
def test_gpu_tensor_descriptors_serve_aligned_half_precision():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need sm_90")
    names = []

    def note(kernel, *rest):
        names.append(kernel.__name__)
        launch.run(kernel, *rest)

    with launch.intercept(note):
        for plan in ("fused", "onepass"):
            for result in check_case(Case(512, 512, 768, 16, dtype=torch.bfloat16), "triton", plan, "cuda"):
                assert result.ok, result
    assert names.count("_lora_linear_gemm_tma_kernel") == 3
    assert names.count("_lora_linear_onepass_tma_kernel") == 1


@pytest.mark.gpu
def test_gpu_graph_reads_its_seed_on_the_device():
    """The captured step draws a new mask whenever the seed tensor changes: nothing was read on the host."""
    inputs = make_inputs(256, 512, 256, 16, torch.bfloat16, "cuda", bias=False)
    seed = torch.tensor(1, device="cuda")
    arguments = (
        inputs["x"],
        inputs["weight"],
        None,
        inputs["lora_A"],
        inputs["lora_B"],
        seed,
        1.0,
        0.5,
        0,
        "fused",
        None,
    )
    forward = ops.forward_ops["triton"]
    want = {value: forward(*arguments[:5], torch.tensor(value, device="cuda"), *arguments[6:]) for value in (1, 2)}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, xa = forward(*arguments)
    for value in (2, 1):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(y, want[value][0])
        assert torch.equal(xa, want[value][1])
    assert not torch.equal(want[1][1], want[2][1])

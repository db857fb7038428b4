"""Backend cuda: lora_linear_group, from its checks to the last kernel, on the emulator or a GPU.

What its kernels do beyond lora_linear's is tested one by one in test_cuda_lora_linear_members.py.
"""

from dataclasses import replace

import pytest
import torch
from cuda_emulation.backend import require_gpu_build
from cuda_emulation.operands import normal

import lorasp
from lorasp import rng, testing
from lorasp.ops import registry
from lorasp.ops.lora_linear_group import backward_ops, forward_ops
from lorasp.testing.lora_linear_group import GRANULARITIES, Case, check_case, make_inputs, run, to_double

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor(-987654321987)


def assert_meets_the_rule(case, device="cpu"):
    wrong = [result for result in check_case(case, "cuda", "auto", device) if not result.ok]
    assert not wrong, wrong


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_part(emulated, dtype, granularity):
    """Members of different N, R and scale; single features (K below 512) and blocks of 64 with a ragged last one."""
    half = dtype != torch.float32
    plain = Case(67, 60, 33, 5, dtype, granularity=granularity)
    assert_meets_the_rule(replace(plain, members=3))
    assert_meets_the_rule(replace(plain, members=2, dropout_p=0.3, frozen_B=True, masters=half))
    if dtype == torch.bfloat16:
        assert_meets_the_rule(replace(plain, members=2, freeze_A=True, bias=False))
        assert_meets_the_rule(replace(plain, masters=True, masks=granularity is None, R=17))
        assert_meets_the_rule(replace(plain, members=2, need_dx=False, masters=True, dropout_p=0.1))
        assert_meets_the_rule(replace(plain, masters=True, frozen_low=True, frozen_B=True))
        assert_meets_the_rule(replace(plain, M=20, K=520, members=2, dropout_p=0.1, keep_input=True))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_more_members_than_one_launch_serves(emulated, p):
    assert_meets_the_rule(Case(40, 60, 16, 2, torch.bfloat16, 6, "feature", dropout_p=p))
    assert_meets_the_rule(Case(300, 64, 24, 8, torch.bfloat16, 2, dropout_p=p))  # several row blocks, g and dB in one


@pytest.mark.parametrize("M", [0, 1])
def test_no_and_few_rows(emulated, M):
    for granularity in GRANULARITIES:
        assert_meets_the_rule(Case(M, 65, 17, 4, torch.float16, 2, granularity, dropout_p=0.1, seed=3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_gradients_and_transposed_weights(emulated, dtype):
    case = Case(70, 90, 65, 8, dtype, members=2, granularity="feature", dropout_p=0.1)
    inputs = make_inputs(case)

    def strided(tensor):
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 5), float("nan"), dtype=tensor.dtype)
        wide[:, : tensor.shape[1]] = tensor
        return wide[:, : tensor.shape[1]]

    def columns(tensors):
        return [t.t().contiguous().t() for t in tensors]

    partial = inputs["partial"]
    spread_indices = {"rows": [torch.stack((rows, rows), 1)[:, 0] for rows in partial.rows]}
    views = inputs | {
        "x": strided(inputs["x"]), "dys": [strided(inputs["dys"][0]), *columns(inputs["dys"][1:])],
        "weights": [strided(inputs["weights"][0]), *columns(inputs["weights"][1:])],
        "lora_As": columns(inputs["lora_As"]), "lora_Bs": columns(inputs["lora_Bs"]),
        "partial": partial._replace(frozen_As=columns(partial.frozen_As), **spread_indices),
    }  # fmt: skip
    with lorasp.use_backend("reference"):
        reference64, reference = run(to_double(inputs), case), run(inputs, case)
    with lorasp.use_backend("cuda"):
        actual = run(views, case)
    for name, value in reference.items():
        testing.assert_close(actual[name], value, reference64[name], dtype, name)


NOTHING = [None, None]


def raw_arguments(case):
    inputs = make_inputs(case)
    partial = inputs["partial"]
    factors = (
        inputs["lora_As"], inputs["lora_Bs"], partial.frozen_As, partial.frozen_Bs, partial.columns, partial.rows,
        NOTHING, NOTHING,
    )  # fmt: skip
    return inputs, factors


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_nan_does_not_leak(emulated, dtype):
    """NaN where all members drop x: nothing of the adapters sees it, x[:, J] included."""
    keeps = [rng.keep_mask(1, (70, 96), 0.5, rng.PURPOSE_LORA_DROPOUT, member) for member in range(2)]
    inputs, factors = raw_arguments(Case(70, 96, 40, 4, dtype, members=2, granularity="feature", dropout_p=0.5))
    x, seed = torch.where(keeps[0] | keeps[1], inputs["x"], torch.nan), torch.tensor(1)
    _, xas, x_columns = forward_ops["cuda"](
        x, inputs["weights"], NOTHING, *factors, seed, [1.0, 1.0], 0.5, [0, 1], True, "auto", NOTHING
    )
    assert torch.equal(x_columns.nan_to_num(9), x[:, inputs["partial"].columns].nan_to_num(9))
    # The frozen product passes NaN on; each adapter may see only what its own mask keeps.
    for member, xa in enumerate(xas):
        assert torch.equal(xa.isnan().any(1), (x.isnan() & keeps[member]).any(1))
    dx, dlora_As, dlora_Bs = backward_ops["cuda"](
        inputs["dys"], None, x_columns, inputs["weights"], *factors, xas, seed, NOTHING, NOTHING, [1.0, 1.0], 0.5,
        [0, 1], 96, True, [True, True], [True, True], "auto", NOTHING,
    )  # fmt: skip
    assert all(tensor.isfinite().all() for tensor in (dx, *dlora_As, *dlora_Bs))


@pytest.mark.parametrize("need_dA", [[True, False], [False, True], [False, False]])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_members_that_train_differently(emulated, p, need_dA):
    """Without dx, only members whose A trains have a g; where only some B train, the others cost no pass."""
    inputs, factors = raw_arguments(Case(70, 96, 40, 4, torch.float32, members=2, granularity="feature"))
    x_columns = inputs["x"][:, inputs["partial"].columns]
    xas = [normal(70, R, dtype=torch.float32, seed=R) for R in (4, 5)]
    arguments = (
        inputs["dys"], None, x_columns, [torch.empty(0, 0)] * 2, *factors, xas, SEED, NOTHING, NOTHING, [1.0, 2.0], p,
        [3, 1], 96, False, need_dA, [not need for need in need_dA], "auto", NOTHING,
    )  # fmt: skip
    _, As, Bs = backward_ops["cuda"](*arguments)
    _, want_As, want_Bs = backward_ops["reference"](*arguments)
    _, exact_As, exact_Bs = backward_ops["reference"](
        *([t.double() if t is not None and t.is_floating_point() else t for t in a] if isinstance(a, list)
          and isinstance(a[0], torch.Tensor) else a.double() if isinstance(a, torch.Tensor) and a.is_floating_point()
          else a for a in arguments)
    )  # fmt: skip
    for have, want, exact in zip((*As, *Bs), (*want_As, *want_Bs), (*exact_As, *exact_Bs), strict=True):
        assert have.shape == want.shape
        testing.assert_close(have, want, exact, torch.float32)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("granularity", [None, "feature"])
def test_opcheck(emulated, granularity, masters):
    dtype = torch.bfloat16 if masters else torch.float32
    inputs = make_inputs(Case(6, 16, 12, 4, dtype, members=2, granularity=granularity, masters=masters))
    partial = inputs["partial"] or lorasp.functional.Partial(None, NOTHING, NOTHING, NOTHING)
    factors = (inputs["lora_As"], inputs["lora_Bs"], partial.frozen_As, partial.frozen_Bs or NOTHING, partial.columns,
               partial.rows, NOTHING, NOTHING)  # fmt: skip
    tail = ([0.5, 1.0], 0.25, [0, 1])
    keep = partial.columns is not None
    forward = (inputs["x"], inputs["weights"], inputs["biases"], *factors, SEED, *tail, keep, "auto", NOTHING)
    torch.library.opcheck(forward_ops["cuda"], forward)
    _, xas, x_columns = forward_ops["cuda"](*forward)
    backward = (
        inputs["dys"], None if keep else inputs["x"], x_columns if keep else None, inputs["weights"], *factors, xas,
        SEED, NOTHING, NOTHING, *tail, 16, True, [True, False], [True, True], "auto", NOTHING,
    )  # fmt: skip
    torch.library.opcheck(backward_ops["cuda"], backward)


def raw_forward(**changed):
    nothing = [None]
    arguments = {
        "x": torch.randn(5, 8), "weights": [torch.randn(6, 8)], "biases": nothing, "lora_As": [torch.randn(2, 3)],
        "lora_Bs": [torch.randn(6, 2)], "frozen_As": [torch.randn(2, 8)], "frozen_Bs": nothing,
        "columns": torch.tensor([1, 4, 6]), "rows": nothing, "entries_A": nothing, "entries_B": nothing, "seed": None,
        "scales": [1.0], "dropout_p": 0.0, "members": [0], "keep_columns": True, "plan": "auto", "packed": nothing,
    }  # fmt: skip
    return forward_ops["cuda"](*(arguments | changed).values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"columns": None}, r"columns must be given when keep_columns"),
        ({"columns": None, "keep_columns": False}, r"frozen_As\[0\] must come with columns"),
        ({"columns": torch.tensor([1, 4])}, r"lora_As\[0\] must be \(2, 2\), got \(2, 3\)"),
        ({"columns": torch.tensor([1.0])}, "columns must have dtype Long, got Float"),
        ({"lora_Bs": [torch.randn(5, 2)]}, r"lora_Bs\[0\] must be \(6, 2\), got \(5, 2\)"),
        ({"rows": [torch.tensor([[1]])], "lora_Bs": [torch.randn(1, 2)]}, r"rows\[0\] must be \(-1\), got \(1, 1\)"),
        ({"entries_A": [torch.tensor([1])], "frozen_As": [None]}, r"lora_As|entries_A\[0\] must come with frozen_As"),
        ({"weights": [torch.randn(6, 7)]}, r"weights\[0\] must be \(6, 8\), got \(6, 7\)"),
        ({"scales": [1.0, 2.0]}, "every list must have one item per weight"),
        ({"plan": "fused"}, "plan must be auto or addmm for backend cuda, got fused"),
        ({"packed": [torch.zeros(1)]}, "packed must be None for backend cuda"),
        ({"dropout_p": 0.5}, "seed must be a 0-d int64 tensor when dropout_p > 0, got None"),
        (
            {"weights": [torch.randn(0, 8)], "lora_Bs": [torch.randn(0, 2)]},
            r"frozen_As\[0\] must be \(R, K\) with R, K, N >= 1, got \(2, 8\), K = 8 and N = 0",
        ),
        (
            {
                "x": torch.randn(5, 0),
                "weights": [torch.randn(6, 0)],
                "frozen_As": [None],
                "lora_As": [torch.randn(2, 0)],
                "columns": None,
                "keep_columns": False,
            },
            r"lora_As\[0\] must be \(R, K\) with R, K, N >= 1, got \(2, 0\), K = 0 and N = 6",
        ),
        (
            {"frozen_As": [torch.randn(0, 8)], "lora_As": [torch.randn(0, 3)], "lora_Bs": [torch.randn(6, 0)]},
            r"frozen_As\[0\] must be \(R, K\) with R, K, N >= 1, got \(0, 8\), K = 8 and N = 6",
        ),
    ],
)
def test_the_raw_op_refuses_what_does_not_fit(emulated, changed, message):
    with pytest.raises(RuntimeError, match=f"lora_linear_group: .*{message}"):
        raw_forward(**changed)


def test_other_plans_are_refused_and_auto_takes_cuda(emulated, monkeypatch):
    inputs = make_inputs(Case(4, 8, 6, 2))
    operands = [inputs[name] for name in ("x", "weights", "lora_As", "lora_Bs")]
    with (
        lorasp.use_backend("cuda"),
        pytest.raises(ValueError, match="plan must be auto or addmm for backend cuda, got 'onepass'"),
    ):
        lorasp.lora_linear_group(*operands, plan="onepass")
    monkeypatch.setattr(registry, "_triton_installed", False)
    for operator in ("lora_linear", "lora_linear_group", "lora_update"):
        assert registry.choose(operator, "cuda", torch.bfloat16) == "cuda"


GPU_SHAPES = ((2048, 4096, 4096, 16), (1000, 1536, 1000, 63), (33, 1024, 2048, 8), (129, 1000, 63, 24))
GPU_VARIANTS = (
    {"members": 3},
    {"members": 3, "dropout_p": 0.1, "masks": True},
    {"members": 3, "granularity": "feature"},
    {"members": 3, "granularity": "feature", "dropout_p": 0.1, "frozen_B": True},
    {"members": 5, "granularity": "feature-whole", "dropout_p": 0.1, "bias": False},
    {"members": 2, "granularity": "element", "masters": True},
    {"members": 2, "granularity": "feature", "masters": True, "frozen_low": True, "frozen_B": True},
    {"granularity": "feature", "masters": True, "freeze_A": True},
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
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_gpu_repeats_to_the_bit_and_never_waits(built, p):
    """Twice the same bits; replayed from a CUDA graph, which no read of a device tensor on the host survives, too."""
    case = Case(2048, 2048, 1024, 16, torch.bfloat16, members=3, granularity="feature", dropout_p=p)
    inputs = make_inputs(case, "cuda")
    partial, nothing, seed = inputs["partial"], [None] * 3, torch.tensor(3, device="cuda")
    factors = (
        inputs["lora_As"], inputs["lora_Bs"], partial.frozen_As, nothing, partial.columns, partial.rows, nothing,
        nothing,
    )  # fmt: skip
    tail = (inputs["scales"], p, [0, 1, 2])

    def both():
        ys, xas, x_columns = forward_ops["cuda"](
            inputs["x"], inputs["weights"], inputs["biases"], *factors, seed, *tail, True, "auto", nothing
        )
        dx, dAs, dBs = backward_ops["cuda"](
            inputs["dys"], None, x_columns, inputs["weights"], *factors, xas, seed, nothing, nothing, *tail, 2048,
            True, [True] * 3, [True] * 3, "auto", nothing,
        )  # fmt: skip
        return *ys, *xas, x_columns, dx, *dAs, *dBs

    first = both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    graph.replay()
    for second in (both(), captured):
        assert all(map(torch.equal, first, second))

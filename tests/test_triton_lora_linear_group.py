"""lora_linear_group on Triton: interpreted everywhere, on hardware where there is a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from interpreter import run_interpreted

from lorasp import rng
from lorasp.testing.lora_linear_group import Case, check_case, make_inputs
from lorasp.triton_kernels import lora_linear_group as kernels

PLANS = ("addmm", "fused", "onepass")


@pytest.mark.parametrize(
    "arguments",
    [("interpret/lora_linear_group.py",), ("test_lora_linear_group.py", "-k", "opcheck and triton")],
    ids=["kernels", "opcheck"],
)
def test_interpreted(arguments):
    run_interpreted(*arguments)


GPU_SHAPES = ((2048, 4096, 4096, 16), (1000, 1536, 1000, 63), (33, 1024, 2048, 8), (129, 1000, 63, 24))
GPU_VARIANTS = (
    {"members": 3},
    {"members": 3, "dropout_p": 0.1, "masks": True},
    {"members": 3, "granularity": "feature"},
    {"members": 3, "granularity": "feature", "dropout_p": 0.1, "frozen_B": True},
    {"members": 4, "granularity": "feature-whole", "dropout_p": 0.1, "bias": False},
    {"members": 2, "granularity": "element", "masters": True},
    {"members": 2, "granularity": "feature", "masters": True, "frozen_low": True, "frozen_B": True},
    {"granularity": "feature", "masters": True, "freeze_A": True},
)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", GPU_VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_gpu(plan, shape, dtype, variant, poisoned_memory):
    if plan == "onepass" and shape[-1] + variant.get("members", 1) > 65:
        pytest.skip("onepass takes R <= 64")
    for result in check_case(Case(*shape, dtype=dtype, **variant), "triton", plan, "cuda"):
        assert result.ok, result


def forward_and_backward(inputs, seed, p, plan):
    """Every output of the launchers for a group of which feature halves train."""
    count, nothing = len(inputs["weights"]), [None] * len(inputs["weights"])
    partial = inputs["partial"]
    factors = (inputs["lora_As"], inputs["lora_Bs"], partial.frozen_As, nothing, partial.columns, partial.rows)
    tail = (inputs["scales"], p, list(range(count)))
    ys, xas, x_columns = kernels.forward(
        inputs["x"], inputs["weights"], inputs["biases"], *factors, nothing, nothing, seed, *tail, True, plan
    )
    dx, dAs, dBs = kernels.backward(
        inputs["dys"], None, x_columns, inputs["weights"], *factors, nothing, nothing, xas, seed, nothing, nothing,
        *tail, inputs["x"].shape[1], True, [True] * count, [True] * count, plan,
    )  # fmt: skip
    return *ys, *xas, x_columns, dx, *dAs, *dBs


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("plan", PLANS)
def test_gpu_repeats_to_the_bit_and_never_waits(plan, p):
    """Twice the same bits; replayed from a CUDA graph, which no read of a device tensor on the host survives, too."""
    case = Case(2048, 2048, 1024, 16, torch.bfloat16, members=3, granularity="feature")
    inputs, seed = make_inputs(case, "cuda"), torch.tensor(3, device="cuda")
    first = forward_and_backward(inputs, seed, p, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(inputs, seed, p, plan)
    graph.replay()
    for second in (forward_and_backward(inputs, seed, p, plan), captured):
        for have, want in zip(second, first, strict=True):
            assert torch.equal(have, want)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [1024, 63])
def test_gpu_mask_bits_of_columns_are_the_definition(K):
    """dA of x = 1, A = 0 and dy B = 1 counts the kept rows of every selected column."""
    M, p, seed = 1000, 0.5, -(2**40) - 17
    inputs = make_inputs(Case(M, K, 16, 1, granularity="feature"), "cuda")
    columns = inputs["partial"].columns
    one = torch.ones(M, 1, device="cuda")
    _, (dA,), _ = kernels.backward(
        [one], None, torch.ones(M, columns.shape[0], device="cuda"), [one], inputs["lora_As"],
        [torch.ones(1, 1, device="cuda")], inputs["partial"].frozen_As, [None], columns, [None], [None], [None], [None],
        torch.tensor(seed, device="cuda"), [None], [None], [0.5], p, [5], K, False, [True], [False], "auto",
    )  # fmt: skip
    keep = rng.keep_mask(seed, (M, K), p, rng.PURPOSE_LORA_DROPOUT, 5)
    assert torch.equal(dA[0].cpu(), keep[:, columns.cpu()].sum(0).float())

"""hidden_cut on Triton: interpreted everywhere, on hardware where there is a GPU."""

import pytest
import torch
from interpreter import run_interpreted

pytest.importorskip("triton", reason="triton is not installed")

import lorasp
from lorasp import hidden_cut
from lorasp.testing.hidden_cut import Case, check_case
from lorasp.triton_kernels import hidden_cut as kernels

PATTERNS = ("element", "column", "span")


def test_interpreted():
    run_interpreted("interpret/hidden_cut.py", "test_hidden_cut.py", "-k", "interpret or (opcheck and triton)")


def test_cpu_tensors_are_refused_where_kernels_are_compiled():
    with pytest.raises(ValueError, match="hidden_cut: x must be on a GPU for triton unless TRITON_INTERPRET=1"):
        kernels.forward(torch.zeros(1, 1, 1), None, torch.tensor(1), 0.5, "element")


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4, 1024, 4096), (3, 333, 1001), (2, 1, 7)])
def test_gpu(shape, dtype, residual, pattern, poisoned_memory):
    for result in check_case(Case(*shape, dtype, pattern, 0.1, residual), "triton", device="cuda"):
        assert result.ok, result


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gpu_masks_are_the_reference_s_bits(pattern):
    ones, seed = torch.ones(3, 500, 333, device="cuda"), torch.tensor(-(2**40) - 17, device="cuda")
    for x in (ones, torch.cat([ones, ones], 2)[..., :333]):
        with lorasp.use_backend("triton"):
            actual = hidden_cut(x, 0.3, pattern=pattern, seed=seed)
        with lorasp.use_backend("reference"):
            assert torch.equal(actual, hidden_cut(ones, 0.3, pattern=pattern, seed=seed))


@pytest.mark.gpu
def test_gpu_graph_reads_its_seed_on_the_device():
    x, seed = torch.ones(2, 64, 256, device="cuda"), torch.tensor(1, device="cuda")
    want = {n: kernels.forward(x, None, torch.tensor(n, device="cuda"), 0.5, "element") for n in (1, 2)}
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = kernels.forward(x, None, seed, 0.5, "element")
    for value in (2, 1):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(y, want[value])

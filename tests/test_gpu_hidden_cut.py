"""hidden_cut on hardware: every backend of the GPU."""

import pytest
import torch

import lorasp
from lorasp import hidden_cut
from lorasp.ops.hidden_cut import PATTERNS, forward_ops
from lorasp.testing.hidden_cut import Case, check_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4, 1024, 4096), (3, 333, 1001), (2, 1, 7)])
def test_outputs_and_gradients(gpu_backend, shape, dtype, residual, pattern, poisoned_memory):
    for result in check_case(Case(*shape, dtype, pattern, 0.1, residual), gpu_backend, device="cuda"):
        assert result.ok, result


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_the_reference_s_bits(gpu_backend, pattern):
    ones, seed = torch.ones(3, 500, 333, device="cuda"), torch.tensor(-(2**40) - 17, device="cuda")
    for x in (ones, torch.cat([ones, ones], 2)[..., :333]):
        with lorasp.use_backend(gpu_backend):
            actual = hidden_cut(x, 0.3, pattern=pattern, seed=seed)
        with lorasp.use_backend("reference"):
            assert torch.equal(actual, hidden_cut(ones, 0.3, pattern=pattern, seed=seed))


def test_a_graph_reads_its_seed_on_the_device(gpu_backend):
    forward = forward_ops[gpu_backend]
    x, seed = torch.ones(2, 64, 256, device="cuda"), torch.tensor(1, device="cuda")
    want = {n: forward(x, None, torch.tensor(n, device="cuda"), 0.5, "element") for n in (1, 2)}
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = forward(x, None, seed, 0.5, "element")
    for value in (2, 1):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(y, want[value])

"""consistency on hardware: every backend of the GPU."""

import pytest
import torch

import lorasp
from lorasp import linear_consistency_loss, testing
from lorasp.testing.consistency import Case, make_inputs

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(512, 32000), (64, 128257), (1000, 2), (33, 5001)], ids=str)
def test_outputs_and_gradients(gpu_backend, shape, dtype, poisoned_memory):
    for case in testing.consistency.cases([shape], [dtype]):
        for result in testing.consistency.check_case(case, gpu_backend, device="cuda"):
            assert result.ok, result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_through_the_head(gpu_backend, dtype):
    for case in testing.linear_consistency.cases([(700, 256, 32000)], [dtype]):
        for result in testing.linear_consistency.check_case(case, gpu_backend, device="cuda"):
            assert result.ok, result


@pytest.mark.parametrize("rows", [3, 512])
def test_repeats_to_the_bit(gpu_backend, rows):
    case = Case(rows, 32000, torch.bfloat16, masks=True)
    inputs = make_inputs(case, "cuda")
    with lorasp.use_backend(gpu_backend):
        first, second = (testing.consistency.run(inputs, case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_workspace_through_the_head(gpu_backend):
    hidden, other = (torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    lm_head = torch.randn(256_000, 1024, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with lorasp.use_backend(gpu_backend):
        gradients = torch.autograd.grad(linear_consistency_loss(hidden, other, lm_head), (hidden, other))
    results = 2 * sum(gradient.nbytes for gradient in gradients)
    assert torch.cuda.max_memory_allocated() - before - results < 64 << 20

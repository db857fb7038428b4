"""consistency on Triton: interpreted everywhere, on hardware where there is a GPU."""

import pytest
import torch
from interpreter import run_interpreted

pytest.importorskip("triton", reason="triton is not installed")

import lorasp
from lorasp import linear_consistency_loss, testing
from lorasp.testing.consistency import Case, make_inputs
from lorasp.triton_kernels import consistency as kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def test_interpreted():
    files = "interpret/consistency.py", "test_consistency.py", "test_linear_consistency.py"
    run_interpreted(*files, "-k", "interpret or (triton and not cuda)")


def test_cpu_tensors_are_refused_where_kernels_are_compiled():
    logits = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="consistency: logits must be on a GPU for triton unless TRITON_INTERPRET=1"):
        kernels.forward(logits, logits, None, "kl")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(512, 32000), (64, 128257), (1000, 2), (33, 5001)])
def test_gpu(shape, dtype, poisoned_memory):
    for case in testing.consistency.cases([shape], [dtype]):
        for result in testing.consistency.check_case(case, "triton", device="cuda"):
            assert result.ok, result


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_through_the_head(dtype):
    for case in testing.linear_consistency.cases([(700, 256, 32000)], [dtype]):
        for result in testing.linear_consistency.check_case(case, "triton", device="cuda"):
            assert result.ok, result


@pytest.mark.gpu
def test_gpu_repeats_to_the_bit():
    case = Case(512, 32000, torch.bfloat16, masks=True)
    inputs = make_inputs(case, "cuda")
    with lorasp.use_backend("triton"):
        first, second = (testing.consistency.run(inputs, case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_gpu_workspace_through_the_head():
    hidden, other = (torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    lm_head = torch.randn(256_000, 1024, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(linear_consistency_loss(hidden, other, lm_head), (hidden, other))
    results = 2 * sum(gradient.nbytes for gradient in gradients)
    assert torch.cuda.max_memory_allocated() - before - results < 64 << 20

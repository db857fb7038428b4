"""consistency on Triton: interpreted; on hardware: test_gpu_consistency.py."""

import pytest
import torch
from interpreter import run_interpreted

pytest.importorskip("triton", reason="triton is not installed")

from lorasp.triton_kernels import consistency as kernels


def test_interpreted():
    files = "interpret/consistency.py", "test_consistency.py", "test_linear_consistency.py"
    run_interpreted(*files, "-k", "interpret or (triton and not cuda)")


def test_cpu_tensors_are_refused_where_kernels_are_compiled():
    logits = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="consistency: logits must be on a GPU for triton unless TRITON_INTERPRET=1"):
        kernels.forward(logits, logits, None, "kl")

"""hidden_cut on Triton: interpreted; on hardware: test_gpu_hidden_cut.py."""

import pytest
import torch
from interpreter import run_interpreted

pytest.importorskip("triton", reason="triton is not installed")

from lorasp.triton_kernels import hidden_cut as kernels


def test_interpreted():
    run_interpreted("interpret/hidden_cut.py", "test_hidden_cut.py", "-k", "interpret or (opcheck and triton)")


def test_cpu_tensors_are_refused_where_kernels_are_compiled():
    with pytest.raises(ValueError, match="hidden_cut: x must be on a GPU for triton unless TRITON_INTERPRET=1"):
        kernels.forward(torch.zeros(1, 1, 1), None, torch.tensor(1), 0.5, "element")

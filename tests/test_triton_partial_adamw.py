"""partial_adamw on Triton: the raw op's tests interpreted; on hardware: test_gpu_partial_adamw.py."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from interpreter import run_interpreted

from lorasp.triton_kernels import partial_adamw as kernels

HYPER = (1e-2, 0.9, 0.999, 1e-8, 0.1)


def test_interpreted():
    run_interpreted("test_partial_adamw.py", "-k", "TestRawOp and triton")


def test_cpu_tensors_are_refused_where_kernels_are_compiled():
    one = [torch.zeros(1)]
    with pytest.raises(ValueError, match=r"partial_adamw: params\[0\] must be on a GPU for triton"):
        kernels.step_(one, one, one, one, [torch.zeros(1, dtype=torch.int32)], [None], *HYPER)

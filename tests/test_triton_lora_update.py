"""lora_update on Triton: interpreted everywhere, on hardware where there is a GPU."""

import pytest
import torch
from interpreter import run_interpreted

pytest.importorskip("triton", reason="triton is not installed")

from lorasp.testing.lora_update import Case, check_case


def test_interpreted():
    tests = ("test_opcheck[triton]", "test_dx_is_added_to_what_is_there[triton-0.5]")
    run_interpreted("interpret/lora_update.py", *(f"test_lora_update.py::{name}" for name in tests))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", [{}, {"dropout_p": 0.1, "masters": True}, {"freeze_A": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096, 4096, 16), (1000, 1536, 8960, 64), (33, 1000, 63, 24)], ids=str)
def test_gpu(shape, dtype, variant, poisoned_memory):
    if dtype == torch.float32:
        variant = variant | {"masters": False}
    for result in check_case(Case(*shape, dtype, **variant), "triton", device="cuda"):
        assert result.ok, result

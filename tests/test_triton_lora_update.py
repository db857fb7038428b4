"""lora_update on Triton: interpreted; on hardware: test_gpu_lora_update.py."""

import pytest
from interpreter import run_interpreted

pytest.importorskip("triton", reason="triton is not installed")


def test_interpreted():
    tests = ("test_opcheck[triton]", "test_dx_is_added_to_what_is_there[triton-0.5]")
    run_interpreted("interpret/lora_update.py", *(f"test_lora_update.py::{name}" for name in tests))

"""lora_update on hardware: every backend of the GPU."""

import pytest
import torch

from lorasp.testing.lora_update import Case, check_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("variant", [{}, {"dropout_p": 0.1, "masters": True}, {"freeze_A": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096, 4096, 16), (1000, 1536, 8960, 64), (33, 1000, 63, 24)], ids=str)
def test_outputs_and_gradients(gpu_backend, shape, dtype, variant, poisoned_memory):
    if dtype == torch.float32:
        variant = variant | {"masters": False}
    for result in check_case(Case(*shape, dtype, **variant), gpu_backend, device="cuda"):
        assert result.ok, result

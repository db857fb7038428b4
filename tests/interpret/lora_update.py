"""lora_update's Triton launchers, interpreted on CPU tensors, against the fp64 reference.

Run by test_triton_lora_update.py. The kernels are lora_linear's, tried on more sizes in lora_linear.py beside this.
"""

import pytest
import torch

import lorasp
from lorasp.testing.lora_update import Case, check_case, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HALF = torch.float16


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 1, 1),
        Case(33, 65, 40, 8, dropout_p=0.1),
        Case(33, 72, 40, 64, HALF, freeze_A=True, dropout_p=0.5),
        Case(65, 40, 33, 3, HALF, masters=True, dropout_p=0.1),
        Case(2, 300, 17, 24, freeze_B=True),
        Case(40, 33, 65, 16, freeze_A=True, need_dx=False),
        Case(0, 5, 3, 2),
    ],
    ids=str,
)
def test_outputs_and_gradients(case):
    for result in check_case(case, "triton"):
        assert result.ok, result


def test_strided_tensors():
    case = Case(20, 33, 17, 3)
    inputs = make_inputs(case)
    expected, have = inputs["y"].clone(), inputs["y"].t().contiguous().t()
    with lorasp.use_backend("triton"):
        lorasp.lora_update(expected, inputs["x"], inputs["lora_A"], inputs["lora_B"])
        lorasp.lora_update(have, inputs["x"].t().contiguous().t(), inputs["lora_A"], inputs["lora_B"])
    assert torch.equal(have, expected)

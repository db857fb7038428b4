"""Every raw op: opcheck (schema, fake tensors, autograd registration, AOT dispatch) on every available backend."""

import pytest
import torch

from lorasp.ops import lora_linear as ops
from lorasp.ops import registry
from lorasp.testing import make_inputs

CPU_BACKENDS = [
    name for name in ("reference", "cpp", "triton") if registry.unsupported(name, "cpu", torch.float32) is None
]


def forward_arguments(p, masters=False):
    inputs = make_inputs(6, 16, 12, 4, torch.bfloat16 if masters else torch.float32, masters=masters)
    seed = torch.tensor(3) if p else None
    names = ("x", "weight", "bias", "lora_A", "lora_B")
    return inputs, (*(inputs[name] for name in names), seed, 0.5, p, 0, "auto", None)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck_forward(backend, p):
    torch.library.opcheck(ops.forward_ops[backend], forward_arguments(p)[1])


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, True), (False, True, False), (True, False, False)])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck_backward(backend, p, needs):
    inputs, arguments = forward_arguments(p)
    _, xa = ops.forward_ops[backend](*arguments)
    need_dx, need_dA, need_dB = needs
    torch.library.opcheck(
        ops.backward_ops[backend],
        (
            inputs["dy"], inputs["x"] if need_dA else None,
            inputs["weight"] if need_dx else inputs["dy"].new_empty((0, 0)), inputs["lora_A"], inputs["lora_B"],
            xa if need_dB else None, arguments[5], None, None, 0.5, p, 0, *needs, "auto", None,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("backend", [name for name in CPU_BACKENDS if name != "triton"])
def test_masters_gradients_come_from_the_accumulators(backend):
    """fp32 gradients under half inputs carry more than half precision."""
    inputs, arguments = forward_arguments(0.0, masters=True)
    _, xa = ops.forward_ops[backend](*arguments)
    _, dlora_A, dlora_B = ops.backward_ops[backend](
        inputs["dy"], inputs["x"], inputs["weight"], inputs["lora_A"], inputs["lora_B"], xa, None, None, None, 0.5, 0.0,
        0, True, True, True, "auto", None,
    )  # fmt: skip
    for grad in (dlora_A, dlora_B):
        assert grad.dtype == torch.float32
        assert not torch.equal(grad, grad.bfloat16().float())

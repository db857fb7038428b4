"""partial_adamw on hardware: every backend of the GPU."""

import pytest
import torch
from many_parameters import assert_many_are_right

from lorasp import testing
from lorasp.ops.partial_adamw import step_ops

pytestmark = pytest.mark.gpu
P, Q = 1000, 4099
HYPER = (1e-2, 0.9, 0.999, 1e-8, 0.1)


@pytest.mark.parametrize("shape", [None, (1, 1), (P, 1), (1, Q), (P, Q)], ids=str)
@pytest.mark.parametrize("taken", [0, 7, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_step(gpu_backend, dtype, taken, shape):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(P, Q, generator=generator) for _ in range(4)]
    values.append(values.pop().square())
    steps = torch.randint(taken, taken + 3, shape or (1,), generator=generator, dtype=torch.int32)
    active = None if shape is None else torch.rand(shape, generator=generator) < 0.5

    def step(backend, kind, device):
        param, grad, *moments = (value.to(dtype).to(device, kind, copy=True) for value in values)
        counted = steps.to(device, copy=True)
        step_ops[backend](
            [param], [grad], *([moment] for moment in moments), [counted],
            [None if active is None else active.to(device)], *HYPER,
        )  # fmt: skip
        return [tensor.cpu() for tensor in (param, *moments, counted)]

    actual = step(gpu_backend, dtype, "cuda")
    reference, exact = step("reference", dtype, "cpu"), step("reference", torch.float64, "cpu")
    assert torch.equal(actual.pop(), reference.pop())
    for tensors in zip(actual, reference, exact, strict=False):
        testing.assert_close(*tensors, dtype)


def test_many_parameters(gpu_backend):
    assert_many_are_right(step_ops[gpu_backend], 80, HYPER, "cuda")

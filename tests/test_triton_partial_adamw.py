"""partial_adamw on Triton: the raw op's tests interpreted, and on hardware where there is a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from interpreter import run_interpreted

from lorasp import testing
from lorasp.ops.partial_adamw import step_ops
from lorasp.triton_kernels import partial_adamw as kernels

P, Q = 1000, 4099
HYPER = (1e-2, 0.9, 0.999, 1e-8, 0.1)


def test_interpreted():
    run_interpreted("test_partial_adamw.py", "-k", "TestRawOp and triton")


def test_cpu_tensors_are_refused_where_kernels_are_compiled():
    one = [torch.zeros(1)]
    with pytest.raises(ValueError, match=r"partial_adamw: params\[0\] must be on a GPU for triton"):
        kernels.step_(one, one, one, one, [torch.zeros(1, dtype=torch.int32)], [None], *HYPER)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [None, (1, 1), (P, 1), (1, Q), (P, Q)], ids=str)
@pytest.mark.parametrize("taken", [0, 7, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gpu(dtype, taken, shape):
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

    actual = step("triton", dtype, "cuda")
    reference, exact = step("reference", dtype, "cpu"), step("reference", torch.float64, "cpu")
    assert torch.equal(actual.pop(), reference.pop())
    for tensors in zip(actual, reference, exact, strict=False):
        testing.assert_close(*tensors, dtype)

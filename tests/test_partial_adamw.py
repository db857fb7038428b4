"""The raw ops of partial_adamw: AdamW where an entry is active, not a bit changed elsewhere."""

import pytest
import torch
from adamw_steps import ACTIVE_SHAPES, PARTIAL, assert_right, opcheck, run
from partial_oracle import BETAS, EPS, WEIGHT_DECAY
from torch import nn

from lorasp import testing
from lorasp.ops import registry
from lorasp.ops.partial_adamw import step_ops

BACKENDS = [name for name in ("reference", "cpp", "triton") if registry.unsupported(name, "cpu", torch.float32) is None]
HYPER = (1e-2, *BETAS, EPS, WEIGHT_DECAY)


class TestRawOp:
    @pytest.mark.parametrize("taken", [0, 2**20])
    @pytest.mark.parametrize("kind", ACTIVE_SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
    def test_every_backend_computes_the_reference(self, backend, dtype, kind, taken):
        if reason := registry.unsupported(backend, "cpu", dtype):
            pytest.skip(reason)
        assert_right(step_ops[backend], dtype, kind, HYPER, taken=taken)

    @pytest.mark.parametrize("kind", PARTIAL)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_nothing_leaks_in_from_where_nothing_is_active(self, backend, dtype, kind):
        if reason := registry.unsupported(backend, "cpu", dtype):
            pytest.skip(reason)
        tensors = run(step_ops[backend], dtype, kind, HYPER, poison=True)
        assert all(tensor.isfinite().all() for tensor in tensors)
        assert tensors[3].unique().numel() > 1 or kind == "all or nothing"

    def test_the_compiled_op_serves_what_it_can(self):
        assert registry.choose("partial_adamw", "cpu", torch.bfloat16) == ("cpp" if "cpp" in BACKENDS else "reference")
        assert registry.choose("partial_adamw", "cpu", torch.float64) == "reference"

    @pytest.mark.parametrize("kind", ACTIVE_SHAPES)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_opcheck(self, backend, kind):
        opcheck(backend, kind, HYPER)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_many_parameters_of_any_shape_and_layout(self, backend):
        shapes, generator = [(), (7,), (3, 4, 5), (0, 3), (2000, 3)], torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=generator) for shape in shapes]
        params += [torch.randn(9, 5, generator=generator).t(), torch.randn(4, 12, generator=generator)[:, ::2]]
        plain = [nn.Parameter(param.clone()) for param in params]
        states = [[torch.zeros_like(param) for param in params] for _ in range(2)]
        steps = [torch.zeros(1, dtype=torch.int32) for _ in params]
        grads = [torch.randn(param.shape, generator=generator) for param in params]
        step_ops[backend](params, grads, *states, steps, [None] * len(params), *HYPER)
        exact = [param.double() for param in plain]
        for many, dtype in ((plain, torch.float32), (exact, torch.float64)):
            many = many if many is plain else [nn.Parameter(param.detach()) for param in many]
            for parameter, grad in zip(many, grads, strict=True):
                parameter.grad = grad.to(dtype)
            torch.optim.AdamW(many, lr=HYPER[0], betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY).step()
            exact = many
        for index, tensors in enumerate(zip(params, plain, exact, strict=True)):
            testing.assert_close(*tensors, torch.float32, str(shapes[index : index + 1]))


@pytest.mark.skipif(registry.available_backends()["cpp"] is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("kind", ACTIVE_SHAPES)
def test_same_bits_at_any_thread_count(kind):
    before, outputs = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs.append(run(step_ops["cpp"], torch.bfloat16, kind, HYPER, size=(301, 403)))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for others in outputs[1:] for one, other in zip(outputs[0], others, strict=True))


@pytest.mark.skipif(registry.available_backends()["cpp"] is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {0: torch.zeros(3, 4, dtype=torch.float64)},
            r"params\[0\] must be float32, bfloat16 or float16 .* got Double",
        ),
        ({1: torch.zeros(4, 3)}, r"grads\[0\] must be \[3, 4\], got \[4, 3\]"),
        ({2: torch.zeros(3, 4).half()}, r"exp_avgs\[0\] must be Float, got Half"),
        ({4: torch.zeros(3, dtype=torch.int32)}, r"steps\[0\] must be contiguous int32 like its active"),
        ({5: torch.ones(2, 4, dtype=torch.bool)}, r"actives\[0\] must be \(1 or 3, 1 or 4\), got \[2, 4\]"),
        ({5: torch.ones(3, 1, dtype=torch.bool)}, r"steps\[0\] must be \[3, 1\], got \[1\]"),
    ],
)
def test_the_cpp_op_refuses(change, message):
    tensors = [torch.zeros(3, 4) for _ in range(4)] + [torch.zeros(1, dtype=torch.int32), None]
    for index, tensor in change.items():
        tensors[index] = tensor
    with pytest.raises((ValueError, TypeError), match=f"partial_adamw: {message}"):
        step_ops["cpp"](*([tensor] for tensor in tensors), *HYPER)

"""partial_adamw over one parameter, three steps with changing selections, for the tests of its backends."""

import torch

from lorasp import testing
from lorasp.ops.partial_adamw import step_ops

P, Q = 37, 101
ACTIVE_SHAPES = {"everything": None, "all or nothing": (1, 1), "rows": (P, 1), "columns": (1, Q), "entries": (P, Q)}
PARTIAL = [kind for kind in ACTIVE_SHAPES if kind != "everything"]
NAMES = ("param", "exp_avg", "exp_avg_sq", "steps")


def run(step, dtype, kind, hyper, *, values=None, taken=0, poison=False, shift=0, size=(P, Q)) -> list[torch.Tensor]:
    """param, exp_avg, exp_avg_sq, steps after three steps over changing selections, what rests the same to the bit.

    values: dtype of the numbers; shift: elements behind a multiple of 16 bytes; size: of the parameter.
    """

    def placed(tensor):
        room = torch.zeros(tensor.numel() + shift, dtype=tensor.dtype)
        return room[shift:].view(tensor.shape).copy_(tensor)

    generator, shape = torch.Generator().manual_seed(1), ACTIVE_SHAPES[kind]
    shape = shape and tuple(full if one > 1 else 1 for one, full in zip(shape, size, strict=True))
    normal = lambda: torch.randn(size, generator=generator).to(values or dtype).to(dtype)  # noqa: E731
    tensors = [placed(tensor) for tensor in (normal(), *torch.zeros(2, *size, dtype=dtype))]
    steps = placed(torch.randint(taken, taken + 3, shape or (1,), generator=generator, dtype=torch.int32))
    for _ in range(3):
        grad = placed(normal())
        active = None if shape is None else placed(torch.rand(shape, generator=generator) < 0.5)
        resting = torch.zeros(size, dtype=torch.bool) if shape is None else ~active.expand(size)
        before = [tensor.clone() for tensor in (*tensors, steps)]
        if poison:
            grad.masked_fill_(resting, torch.nan)
        step(*([tensor] for tensor in (tensors[0], grad, *tensors[1:], steps)), [active], *hyper)
        for old, new in zip(before, tensors, strict=False):
            assert torch.equal(old[resting], new[resting])
        assert torch.equal(steps, before[3] + (1 if active is None else active))
    return [*tensors, steps]


def assert_right(step, dtype, kind, hyper, **options) -> None:
    actual, plain = (run(one, dtype, kind, hyper, **options) for one in (step, step_ops["reference"]))
    exact = run(step_ops["reference"], torch.float64, kind, hyper, values=dtype, **options)
    for what, *tensors in zip(NAMES[:3], actual, plain, exact, strict=False):
        testing.assert_close(*tensors, dtype, what)
    assert torch.equal(actual[3], plain[3])


def opcheck(backend, kind, hyper) -> None:
    shape = ACTIVE_SHAPES[kind]
    active = None if shape is None else torch.rand(shape) < 0.5
    tensors = [[torch.rand(P, Q)] for _ in range(4)]
    steps = torch.zeros(shape or (1,), dtype=torch.int32)
    torch.library.opcheck(step_ops[backend], (*tensors, [steps], [active], *hyper))

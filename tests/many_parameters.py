"""partial_adamw over many parameters at once, for the tests of backends that step several in one launch."""

import torch

from lorasp import testing
from lorasp.ops.partial_adamw import step_ops


def many(count):
    """The raw op's six lists: parameters of many sizes and grains, some of them empty."""
    generator = torch.Generator().manual_seed(0)
    lists = [[] for _ in range(6)]
    for i in range(count):
        p, q = ((3, 5), (1, 2100), (16, 9), (0, 3), (2, 0), (300, 1))[i % 6]
        values = [torch.randn(p, q, generator=generator) for _ in range(3)]
        values.append(torch.rand(p, q, generator=generator))
        shape = ((1, 1), None, (p, 1), (1, q), (p, q))[i % 5]
        active = None if shape is None else torch.rand(shape, generator=generator) < 0.6
        steps = torch.randint(0, 9, shape or (1,), generator=generator, dtype=torch.int32)
        for one, tensor in zip(lists, (*values, steps, active), strict=True):
            one.append(tensor)
    return lists


def assert_many_are_right(step, count, hyper, device="cpu"):
    """Every parameter and moment by the tolerance rule, as one tensor of each kind; counted steps exactly."""
    actual = [[None if tensor is None else tensor.to(device) for tensor in tensors] for tensors in many(count)]
    plain, exact = many(count), many(count)
    exact[:4] = [[tensor.double() for tensor in tensors] for tensors in exact[:4]]
    step(*actual, *hyper)
    step_ops["reference"](*plain, *hyper)
    step_ops["reference"](*exact, *hyper)
    for what, number in (("param", 0), ("exp_avg", 2), ("exp_avg_sq", 3)):
        have, want, want64 = (torch.cat([t.cpu().flatten() for t in lists[number]]) for lists in (actual, plain, exact))
        testing.assert_close(have, want, want64, torch.float32, what)
    for have, want in zip(actual[4], plain[4], strict=True):
        assert torch.equal(have.cpu(), want)

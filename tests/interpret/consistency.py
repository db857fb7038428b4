"""consistency's Triton kernels, interpreted on CPU tensors, against the fp64 reference.

Run by test_triton_consistency.py, in a process of its own, as lora_linear.py here is.
"""

import itertools

import pytest
import torch

import lorasp
from lorasp import consistency_loss, testing
from lorasp.ops import linear_consistency as linear_ops

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy tells of the infinities and NaNs that the kernels select away.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning"),
]

HALF_AND_SINGLE = (torch.float32, torch.float16)


@pytest.mark.parametrize(
    ("rows", "V", "dtype"),
    [(5, 1, torch.float32), (9, 17, torch.float16), (9, 17, torch.float32), (3, 4097, torch.float16),
     (2, 9000, torch.float32)],
)  # fmt: skip
def test_outputs_and_gradients(rows, V, dtype):
    for case in testing.consistency.cases([(rows, V)], [dtype]):
        for result in testing.consistency.check_case(case, "triton"):
            assert result.ok, result


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_through_the_head_in_chunks(dtype, monkeypatch):
    monkeypatch.setattr(linear_ops, "LOGITS_BYTES", 8000)
    for case in testing.linear_consistency.cases([(19, 10, 129)], [dtype]):
        for result in testing.linear_consistency.check_case(case, "triton"):
            assert result.ok, result


def test_the_maximum_may_come_late_and_blocks_may_hold_nothing():
    logits = torch.linspace(-40, 40, 9000).masked_fill(torch.arange(9000) < 4500, -torch.inf).expand(2, 9000)
    other = logits + torch.sin(torch.arange(9000.0))
    with lorasp.use_backend("reference"):
        plain = consistency_loss(logits, other, reduction="none")
        exact = consistency_loss(logits.double(), other.double(), reduction="none")
    with lorasp.use_backend("triton"):
        testing.assert_close(consistency_loss(logits, other, reduction="none"), plain, exact, torch.float32)


def test_strided_rows_and_no_rows():
    logits, other = torch.randn(2, 3, 4, 70)
    with lorasp.use_backend("triton"):
        expected = consistency_loss(logits, other, reduction="none")
        leaves = [side.clone().requires_grad_() for side in (logits, other)]
        plain = torch.autograd.grad(consistency_loss(*leaves, reduction="none").sum(), leaves)
        views = (
            lambda t: t,
            lambda t: torch.cat([t, t], 1)[:, :4],
            lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
            lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        )
        for lay_logits, lay_other in itertools.product(views, views):
            sides = [lay_logits(logits).requires_grad_(), lay_other(other).requires_grad_()]
            rows = consistency_loss(*sides, reduction="none")
            assert torch.equal(rows, expected)
            gradients = torch.autograd.grad(rows.sum(), sides)
            for have, want in zip(gradients, plain, strict=True):
                assert torch.equal(have, want)
        assert consistency_loss(logits[:0], other[:0]).item() == 0.0

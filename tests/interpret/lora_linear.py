"""lora_linear's Triton kernels, interpreted on CPU tensors, against the fp64 reference.

Run by test_triton_lora_linear.py. TRITON_INTERPRET is read when triton is imported, so these files have a
process of their own and names that a plain pytest run does not collect. bfloat16 is absent: the interpreter's tl.dot is
wrong in it.
"""

import itertools
from dataclasses import replace

import pytest
import torch

import lorasp
from lorasp.testing import Case, check_case

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PLANS = ("addmm", "fused", "onepass")
# (M, K, N, R): odd and tiny sizes, K and N that suit tensor descriptors and that do not, every padding of R.
SHAPES = (
    (1, 1, 1, 1),
    (1, 129, 63, 8),
    (63, 129, 1, 3),
    (129, 1, 63, 24),
    (63, 63, 129, 1),
    (64, 64, 96, 16),
    (33, 72, 40, 64),
    (129, 63, 65, 16),
    (2, 1000, 63, 24),
    (1000, 16, 24, 3),
    (3, 63, 129, 64),
)
PLAIN = Case(0, 0, 0, 0)
VARIANTS = (
    PLAIN,
    replace(PLAIN, bias=False, dropout_p=0.5, zero_weight=True),
    replace(PLAIN, masks=True, dropout_p=0.1),
    replace(PLAIN, freeze_A=True, dropout_p=0.5),
    replace(PLAIN, need_dx=False, bias=False, dropout_p=0.1),
    replace(PLAIN, freeze_A=True, need_dx=False, masks=True),
)


def _cases():
    """Every shape in two variants, each variant and each dtype by turns."""
    variants = itertools.cycle((*VARIANTS, VARIANTS[0]))
    dtypes = itertools.cycle((torch.float32, torch.float16))
    cases = [replace(next(variants), M=M, K=K, N=N, R=R, dtype=next(dtypes)) for M, K, N, R in SHAPES for _ in range(2)]
    for shape in ((64, 64, 96, 16), (33, 63, 65, 3)):
        half = Case(*shape, dtype=torch.float16, masters=True)
        cases += half, replace(half, dropout_p=0.5, masks=True)
    return cases


@pytest.mark.parametrize("case", _cases(), ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_outputs_and_gradients(case, plan):
    for result in check_case(case, "triton", plan):
        assert result.ok, result


@pytest.mark.parametrize("plan", PLANS)
def test_leading_dimensions_and_no_rows(plan):
    A, B, weight = torch.randn(3, 5), torch.randn(7, 3), torch.randn(7, 5)
    for lead in ((2, 0), (2, 3)):
        x = torch.randn(*lead, 5, requires_grad=True)
        leaves = (x, A.clone().requires_grad_(), B.clone().requires_grad_())
        with lorasp.use_backend("triton", plan):
            y = lorasp.lora_linear(leaves[0], weight, leaves[1], leaves[2], dropout_p=0.5, seed=1)
        assert y.shape == (*lead, 7)
        for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
            assert grad.shape == leaf.shape
            assert grad.isfinite().all()
            assert (grad.count_nonzero() == 0) == (0 in lead)

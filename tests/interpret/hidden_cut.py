"""hidden_cut's Triton kernel, interpreted on CPU tensors, against the reference.

Run by test_triton_hidden_cut.py, in a process of its own, as lora_linear.py here is.
"""

import itertools

import pytest
import torch

import lorasp
from lorasp import hidden_cut
from lorasp.testing.hidden_cut import Case, check_case

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PATTERNS = ("element", "column", "span")
SHAPES = ((1, 1, 1), (2, 3, 5), (3, 9, 64), (2, 17, 129), (1, 2, 2050))


@pytest.mark.parametrize("residual", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_outputs_and_gradients(pattern, dtype, residual):
    for shape in SHAPES:
        for result in check_case(Case(*shape, dtype, pattern, 0.3, residual), "triton"):
            assert result.ok, result


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_the_reference_s_bits(pattern):
    """Flat and strided: rows that start inside a group of eight elements too."""
    for shape in SHAPES:
        ones, seed = torch.ones(shape), -(2**40) - 17
        wide = torch.cat([ones, ones], 2)[..., : shape[2]]
        with lorasp.use_backend("reference"):
            expected = hidden_cut(ones, 0.4, pattern=pattern, seed=seed)
        with lorasp.use_backend("triton"):
            for x in (ones, wide, ones.transpose(0, 1).contiguous().transpose(0, 1)):
                assert torch.equal(hidden_cut(x, 0.4, pattern=pattern, seed=seed), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_x_and_residual_lie_as_they_like(pattern):
    """Each in its own strides: whole, sliced, batch inside the sequence."""
    plain = torch.randn(2, 2, 9, 33)

    def laid_out(t):
        return t, torch.cat([t, t], 2)[..., :33], t.transpose(0, 1).contiguous().transpose(0, 1)

    with lorasp.use_backend("triton"):
        expected = hidden_cut(plain[0], 0.4, pattern=pattern, residual=plain[1], seed=3)
        for x, residual in itertools.product(laid_out(plain[0]), laid_out(plain[1])):
            assert torch.equal(hidden_cut(x, 0.4, pattern=pattern, residual=residual, seed=3), expected)


def test_dropped_nan_does_not_leak_and_nothing_is_nothing():
    with lorasp.use_backend("triton"):
        for pattern in PATTERNS:
            dropped = hidden_cut(torch.ones(2, 9, 5), 0.5, pattern=pattern, seed=2) == 0
            x = torch.ones(2, 9, 5).masked_fill(dropped, torch.nan)
            assert hidden_cut(x, 0.5, pattern=pattern, seed=2).isfinite().all()
            assert hidden_cut(torch.ones(2, 0, 5), 0.5, pattern=pattern).shape == (2, 0, 5)

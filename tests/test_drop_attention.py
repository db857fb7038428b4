"""DropAttention's reference: DropKey's forward pass, another gradient."""

import pytest
import torch

from lorasp.reference import dropkey_attention
from lorasp.reference.drop_attention import drop_attention

SCALE = 0.4


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 6, 8), (2, 2, 9, 8), (2, 2, 9, 5), (2, 4, 6, 5))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pattern", ["column", "element", "span"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_forward_is_dropkey_s(pattern, p, is_causal):
    q, k, v, _ = inputs()
    bias = torch.randn(1, 4, 6, 9, dtype=torch.float64)
    arguments = (q, k, v, bias, torch.tensor(3), p, pattern, is_causal, SCALE)
    torch.testing.assert_close(drop_attention(*arguments), dropkey_attention.forward(*arguments)[0])


@pytest.mark.parametrize("pattern", ["column", "element", "span"])
def test_gradient_is_that_of_a_constant_denominator(pattern):
    """dz = G - p rowsum(G), G = w' o dp, p the undropped softmax."""
    q, k, v, do = inputs()
    q.requires_grad_()
    o = drop_attention(q, k, v, None, torch.tensor(3), 0.4, pattern, False, SCALE)
    (have,) = torch.autograd.grad(o, q, do)
    keys, values = (t.repeat_interleave(2, 1) for t in (k, v))
    p = torch.softmax(q.detach() @ keys.mT * SCALE, -1)
    w = p * dropkey_attention.keep_mask(torch.tensor(3), p.shape, 0.4, pattern)
    G = w / w.sum(-1, keepdim=True) * (do @ values.mT)
    torch.testing.assert_close(have, (G - p * G.sum(-1, keepdim=True)) @ keys * SCALE)


def test_a_query_without_keys_gives_zeros_and_finite_gradients():
    q, k, v, do = (t.requires_grad_() for t in inputs())
    hidden = torch.zeros(1, 1, 6, 9, dtype=torch.bool)
    hidden[..., 1:, :] = True
    o = drop_attention(q, k, v, hidden, None, 0.0, "column", False, SCALE)
    assert (o[:, :, 0] == 0).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(o, (q, k, v), do))

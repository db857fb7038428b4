"""DropAttention in plain PyTorch, for comparison with DropKey: weights are dropped after the softmax.

    p = softmax(scale q k^T + attn_mask);  w = keep o p;  o = (w / NoGrad(rowsum w)) v

The denominator takes no gradient: with w' = w / rowsum w, the forward pass is DropKey's, and dz = G - p rowsum(G) with
G = w' o (do v^T), where DropKey has w' in place of p. A query that sees no kept key gives zeros.
DropAttention: arXiv 1907.11065, section 3; NoGrad denominator and patterns: HiddenKey arXiv 2403.00812, section 3.1.
"""

import torch
from torch import Tensor

from lorasp.reference import dropkey_attention


def drop_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    pattern: str,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """o (B, H, Sq, Dv), for autograd to differentiate; arguments and drop decisions as dropkey_attention.forward's."""
    shape = (*q.shape[:3], k.shape[2])
    seen = dropkey_attention.visible(q, k, attn_mask, None, 0.0, pattern, is_causal)
    z = dropkey_attention.logits(q, k, attn_mask, seen, scale)
    p = torch.softmax(z.masked_fill(~seen.any(-1, keepdim=True), 0.0), -1).masked_fill(~seen, 0.0)
    keep = dropkey_attention.keep_mask(seed, shape, dropout_p, pattern)
    w = p if keep is None else torch.where(keep, p, 0)
    total = w.detach().sum(-1, keepdim=True)
    values = dropkey_attention.per_query_head(v.to(w.dtype), q.shape[1])
    return ((w / total.masked_fill(total == 0, 1.0)) @ values).to(q.dtype)

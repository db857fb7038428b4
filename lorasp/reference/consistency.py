"""consistency in plain PyTorch: the definition every other backend is checked against.

P = softmax(logits), Q = softmax(other) over the last dimension, d = log P - log Q, of rows (B, T):

    KL(P|Q) = sum P d          kl = (KL(P|Q) + KL(Q|P)) / 2          js = KL(P|Q)
    dlogits = a P (d - KL(P|Q)) + b (P - Q)          dother = b Q (-d - KL(Q|P)) + a (Q - P)

with (a, b) = (1/2, 1/2) for kl and (1, 0) for js. An entry of probability 0 adds nothing. A probability that meets a
zero of the other distribution makes the divergence infinite: its row is inf and its gradients are NaN.

stats (B, T, 6): max logits, 1 / sum exp(logits - max), the same of other, KL(P|Q), KL(Q|P).
HiddenKey: arXiv 2403.00812 (its "JS" is KL(P|Q), Q the output in inference mode).
"""

import torch
from torch import Tensor

WEIGHTS = {"kl": (0.5, 0.5), "js": (1.0, 0.0)}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _normalise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(max, 1 / sum exp(x - max), log softmax), the first two (B, T, 1)."""
    highest = x.amax(-1, keepdim=True)
    shifted = x - highest
    total = shifted.exp().sum(-1, keepdim=True)
    return highest, 1 / total, shifted - total.log()


def _expect(p: Tensor, d: Tensor) -> Tensor:
    """p d, 0 where p is 0."""
    return torch.where(p == 0, 0, p * d)


def forward(logits: Tensor, other: Tensor, mask: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """(rows (B, T), stats (B, T, 6)) of logits and other (B, T, V), in fp32 (fp64 for fp64). mask (B, T): False rows
    are 0."""
    max_a, over_a, log_p = _normalise(_wide(logits))
    max_b, over_b, log_q = _normalise(_wide(other))
    forwards = _expect(log_p.exp(), log_p - log_q).sum(-1, keepdim=True)
    backwards = _expect(log_q.exp(), log_q - log_p).sum(-1, keepdim=True)
    stats = torch.cat((max_a, over_a, max_b, over_b, forwards, backwards), -1)
    rows = (forwards if kind == "js" else (forwards + backwards) / 2).squeeze(-1)
    if mask is None:
        return rows, stats
    return torch.where(mask, rows, 0), torch.where(mask.unsqueeze(-1), stats, 0)


def backward(
    drows: Tensor,
    logits: Tensor,
    other: Tensor,
    stats: Tensor,
    mask: Tensor | None,
    kind: str,
    need_dlogits: bool,
    need_dother: bool,
) -> tuple[Tensor, Tensor]:
    """(dlogits, dother) in the inputs' dtype, (0,) where it is not needed. drows (B, T)."""
    a, b = WEIGHTS[kind]
    max_a, over_a, max_b, over_b, forwards, backwards = stats.unsqueeze(-2).unbind(-1)
    log_p, log_q = _wide(logits) - max_a + over_a.log(), _wide(other) - max_b + over_b.log()
    p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
    finite = (forwards if kind == "js" else forwards + backwards).isfinite()

    def finish(gradient):
        gradient = torch.where(finite, gradient, torch.nan) * drows.unsqueeze(-1)
        gradient = gradient if mask is None else torch.where(mask.unsqueeze(-1), gradient, 0)
        return gradient.to(logits.dtype)

    empty = logits.new_empty(0)
    dlogits = finish(a * _expect(p, d - forwards) + b * (p - q)) if need_dlogits else empty
    # Named by b: for js the inverse divergence may be infinite where the gradient is not.
    inverse = b * _expect(q, -d - backwards) if b else 0.0
    dother = finish(inverse + a * (q - p)) if need_dother else empty.clone()
    return dlogits, dother

"""linear_consistency in plain PyTorch: both heads' logits whole, then consistency.

logits = hidden W^T + bias          rows = consistency(logits, other W^T + bias)
dhidden = dlogits W          dW = dlogits^T hidden + dother_logits^T other
"""

from torch import Tensor
from torch.nn.functional import linear

from lorasp.reference import consistency


def forward(
    hidden: Tensor,
    other: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    drows: Tensor | None,
    kind: str,
    need_dhidden: bool,
    need_dother: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(rows (M,), dhidden (M, H), dother (M, H), dweight (V, H), dbias (V,)) for the gradient drows of the rows, 1 if
    None. hidden, other (M, H), weight (V, H), bias (V,), mask (M,). What is not needed is (0,).
    """
    logits = linear(hidden, weight, bias).unsqueeze(0)
    others = linear(other, weight, bias).unsqueeze(0)
    mask = None if mask is None else mask.unsqueeze(0)
    rows, stats = consistency.forward(logits, others, mask, kind)
    both = need_dweight or need_dbias
    drows = rows.new_ones(rows.shape) if drows is None else drows.unsqueeze(0)
    needs = need_dhidden or both, need_dother or both
    dlogits, dothers = consistency.backward(drows, logits, others, stats, mask, kind, *needs)
    empty = [hidden.new_empty(0) for _ in range(4)]
    dhidden = dlogits[0] @ weight if need_dhidden else empty[0]
    dother = dothers[0] @ weight if need_dother else empty[1]
    if mask is not None and need_dweight:
        hidden, other = (side.where(mask[0].unsqueeze(-1), 0) for side in (hidden, other))
    dweight = dlogits[0].t() @ hidden + dothers[0].t() @ other if need_dweight else empty[2]
    dbias = dlogits[0].sum(0) + dothers[0].sum(0) if need_dbias else empty[3]
    return rows[0], dhidden, dother, dweight, dbias

"""lora_update in plain PyTorch: the definition every other backend is checked against.

    xa = s * (D o x) A^T          D = keep / (1 - p)
    y += xa B^T
    g  = s * dy B                 (D's rescale is folded into g)
    dx += keep o (g A)
    dB = dy^T xa                  dA = g^T (keep o x)

What lora_linear adds to its frozen product. LoRA: arXiv 2106.09685, eq. 3. LoRA-FA: arXiv 2308.03303, section 3.
"""

import torch
from torch import Tensor

from lorasp import rng
from lorasp.reference.lora_linear import keep_of, matmul


def forward(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    member: int,
) -> Tensor:
    """xa (M, R) of x (M, K), lora_A (R, K), lora_B (N, R); y (M, N) += xa lora_B^T in place.

    y and x have one dtype, the compute dtype; lora_A and lora_B may be fp32 and are rounded to it.
    """
    keep = keep_of(x, seed, dropout_p, member)
    dropped = x if keep is None else torch.where(keep, x, 0)
    xa = (matmul(dropped, lora_A.to(x.dtype).t()) * (scale * rng.rescale(dropout_p))).to(x.dtype)
    y.addmm_(xa, lora_B.to(x.dtype).t())
    return xa


def backward(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    member: int,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor, Tensor]:
    """(dlora_A (R, K), dlora_B (N, R)) of dy (M, N); dx (M, K), unless None, += keep o (g lora_A) in place.

    What is not needed is an empty tensor of shape (0,). dlora_A and dlora_B have the dtypes of lora_A and lora_B.
    """
    dlora_A, dlora_B = dy.new_empty(0), dy.new_empty(0)
    if dx is not None or need_dA:
        g = (matmul(dy, lora_B.to(dy.dtype)) * (scale * rng.rescale(dropout_p))).to(dy.dtype)
        keep = keep_of(dy.new_empty((dy.shape[0], lora_A.shape[1])), seed, dropout_p, member)
        if dx is not None and keep is None:
            dx.addmm_(g, lora_A.to(dy.dtype))
        elif dx is not None:
            dx.add_(torch.where(keep, g @ lora_A.to(dy.dtype), 0))
        if need_dA:
            dlora_A = matmul(g.t(), x if keep is None else torch.where(keep, x, 0)).to(lora_A.dtype)
    if need_dB:
        dlora_B = matmul(dy.t(), xa).to(lora_B.dtype)
    return dlora_A, dlora_B

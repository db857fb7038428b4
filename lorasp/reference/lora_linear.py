"""lora_linear in plain PyTorch: the definition every other backend is checked against.

    xa = s * (D o x) A^T          D = keep / (1 - p)
    y  = x W^T + bias + xa B^T
    g  = s * dy B                 (D's rescale is folded into g)
    dx = keep o (g A) + dy W
    dB = dy^T xa                  dA = g^T (keep o x)

LoRA: Hu et al., arXiv 2106.09685, eq. 3. LoRA-FA (A frozen, xa kept instead of x): arXiv 2308.03303, section 3.
"""

import torch
from torch import Tensor

from lorasp import rng


def keep_of(x: Tensor, seed: Tensor | None, dropout_p: float, member: int) -> Tensor | None:
    if rng.threshold(dropout_p) == 0:
        return None
    return rng.keep_mask(seed, tuple(x.shape), dropout_p, rng.PURPOSE_LORA_DROPOUT, member)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the wider of fp32 and their dtype: the accumulator, before it is rounded once."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.to(wide) @ b.to(wide)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    member: int,
) -> tuple[Tensor, Tensor]:
    """(y (M, N), xa (M, R)) of x (M, K), weight (N, K), bias (N,), lora_A (R, K), lora_B (N, R).

    All but lora_A and lora_B have one dtype, the compute dtype; lora_A and lora_B may be fp32 and are rounded to it.
    """
    keep = keep_of(x, seed, dropout_p, member)
    dropped = x if keep is None else torch.where(keep, x, 0)
    xa = (matmul(dropped, lora_A.to(x.dtype).t()) * (scale * rng.rescale(dropout_p))).to(x.dtype)
    y = torch.addmm(torch.nn.functional.linear(x, weight, bias), xa, lora_B.to(x.dtype).t())
    return y, xa


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    seed: Tensor | None,
    mask_A: Tensor | None,
    mask_B: Tensor | None,
    scale: float,
    dropout_p: float,
    member: int,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx (M, K), dlora_A (R, K), dlora_B (N, R)); what is not needed is an empty tensor of shape (0,).

    dlora_A and dlora_B have the dtypes of lora_A and lora_B. mask_A, mask_B: False receives exactly zero.
    """
    dx, dlora_A, dlora_B = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    if need_dx or need_dA:
        g = (matmul(dy, lora_B.to(dy.dtype)) * (scale * rng.rescale(dropout_p))).to(dy.dtype)
        shape = dy.new_empty((dy.shape[0], lora_A.shape[1]))
        keep = keep_of(shape, seed, dropout_p, member)
        if need_dx:
            low_rank = g @ lora_A.to(dy.dtype)
            dx = torch.addmm(low_rank if keep is None else torch.where(keep, low_rank, 0), dy, weight)
        if need_dA:
            dropped = x if keep is None else torch.where(keep, x, 0)
            dlora_A = matmul(g.t(), dropped).to(lora_A.dtype)
            dlora_A = dlora_A if mask_A is None else torch.where(mask_A, dlora_A, 0)
    if need_dB:
        dlora_B = matmul(dy.t(), xa).to(lora_B.dtype)
        dlora_B = dlora_B if mask_B is None else torch.where(mask_B, dlora_B, 0)
    return dx, dlora_A, dlora_B

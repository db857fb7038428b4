"""AdamW over the active entries of parameters, in plain PyTorch: the definition every other backend is checked against.

Where `active` is True, with t the entry's own number of active steps, this one included:

    m = b1 m + (1 - b1) g         v = b2 v + (1 - b2) g^2
    p = (1 - lr wd) p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

Everywhere else p, m, v and t keep their bits.

AdamW: Loshchilov & Hutter, arXiv 1711.05101, algorithm 2; counting an entry's own steps is ours.
"""

import torch
from torch import Tensor


def step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    active: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step, in place. param, grad, exp_avg, exp_avg_sq: one shape, one dtype, computed in at least fp32.

    active: bool, broadcastable to param, None for everything; steps: int32 of active's shape (one element for None).
    """
    wide = torch.promote_types(param.dtype, torch.float32)
    steps.add_(1 if active is None else active)
    taken = (steps.reshape(()) if active is None else steps).clamp(min=1).double()
    step_size = (lr / (1 - beta1**taken)).to(wide)
    correction = (1 - beta2**taken).sqrt().to(wide)
    g, m, v, p = (tensor.to(wide) for tensor in (grad, exp_avg, exp_avg_sq, param))
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    p = p * (1 - lr * weight_decay) - step_size * m / (v.sqrt() / correction + eps)
    for tensor, new in ((exp_avg, m), (exp_avg_sq, v), (param, p)):
        new = new.to(tensor.dtype)
        tensor.copy_(new if active is None else torch.where(active, new, tensor))

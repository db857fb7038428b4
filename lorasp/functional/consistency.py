"""consistency_loss and linear_consistency_loss: validate, choose a backend, call the operator."""

import math

import torch
from torch import Tensor

from lorasp.functional.arguments import autocast_dtype, check_like, check_tensor, not_same, three_dimensional
from lorasp.ops import registry
from lorasp.ops.consistency import KINDS, ConsistencyFunction
from lorasp.ops.linear_consistency import LinearConsistencyFunction

REDUCTIONS = ("batchmean", "mean", "sum", "none")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def consistency_loss(
    logits: Tensor,
    other: Tensor,
    kind: str = "kl",
    mask: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """Divergence of two passes' predictions: kl = (KL(P|Q) + KL(Q|P))/2, js = KL(P|Q).

    P = softmax(logits), Q = softmax(other) over the last dimension, in nats. logits, other (..., V), V >= 1, one dtype
    of float64 (reference backend), float32, bfloat16, float16; any strides. Gradients flow to both, or to the one that
    requires it. js is HiddenKey's name for KL against the inference-mode output: pass that as `other`.

    mask (...), bool: False rows add nothing and receive zero gradient, whatever they hold. reduction: "batchmean" over
    the unmasked rows, "mean" over their entries (as torch.nn.functional.kl_div has it), "sum", "none" for the rows
    (...). No unmasked row: 0. The result is float32 (float64 for float64), summed in it.

    An entry that is -inf on both sides is no part of the vocabulary: no loss, gradient zero. A zero of one distribution
    where the other is positive makes the divergence infinite (kl: on either side; js: in other): the row is inf, its
    gradient NaN. Streams over the vocabulary: backward keeps the logits themselves and 24 bytes a row.

    Raises TypeError and ValueError for arguments that do not fit, RuntimeError for second derivatives.
    Source: HiddenKey arXiv 2403.00812.
    """
    where = "consistency_loss"
    _check_first(where, "logits", logits, "(..., V) with V >= 1")
    check_like(where, "other", other, "logits", logits.shape, (logits.dtype,), logits.device)
    _check_options(where, kind, mask, reduction, "logits", logits)
    backend = registry.choose("consistency", logits.device.type, logits.dtype)
    lead, V = logits.shape[:-1], logits.shape[-1]
    rows_kept = None if mask is None else three_dimensional(mask.unsqueeze(-1)).squeeze(-1)
    logits, other = three_dimensional(logits), three_dimensional(other)
    rows = ConsistencyFunction.apply(logits, not_same(other, logits), rows_kept, kind, backend)
    if reduction == "none":
        return rows.reshape(lead)
    divisor = _divisor(reduction, mask, lead, V, rows)
    return rows.sum() / divisor


def linear_consistency_loss(
    hidden: Tensor,
    other_hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None = None,
    kind: str = "kl",
    mask: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """consistency_loss(hidden W^T + bias, other_hidden W^T + bias, ...) without the logits.

    hidden, other_hidden (..., H), lm_head W (V, H), bias (V,), one dtype; kind, mask (...), reduction and the result as
    in consistency_loss. Rows pass through the head in chunks: the workspace stays under 64 MiB for vocabularies up to
    256k and H >= 64, lm_head's own gradient aside (accumulated in float32). Gradients flow to whatever requires
    them. They are formed in forward, where the logits are at hand, and kept, in the size of what requires them; for
    reduction "none" in backward, from logits formed again.

    Under autocast it computes what torch.nn.functional.linear computes, cast weight included.
    Raises TypeError and ValueError for arguments that do not fit, RuntimeError for second derivatives.
    Source: HiddenKey arXiv 2403.00812; chunks as in Liger-Kernel, arXiv 2410.10989.
    """
    where = "linear_consistency_loss"
    _check_first(where, "hidden", hidden, "(..., H) with H >= 1")
    autocast = autocast_dtype(hidden)
    dtypes = (hidden.dtype,) if autocast is None else _DTYPES[1:]
    check_like(where, "other_hidden", other_hidden, "hidden", hidden.shape, dtypes, hidden.device)
    H = hidden.shape[-1]
    check_tensor(where, "lm_head", lm_head, (-1, H), "(V, {1}) with V >= 1", dtypes, hidden.device)
    V = lm_head.shape[0]
    if bias is not None:
        check_tensor(where, "bias", bias, (V,), "({0},)", dtypes, hidden.device)
    _check_options(where, kind, mask, reduction, "hidden", hidden)
    dtype = autocast or hidden.dtype
    backend = registry.choose("consistency", hidden.device.type, dtype)
    lead = hidden.shape[:-1]
    count = math.prod(lead)
    divisor = None if reduction == "none" else _divisor(reduction, mask, lead, V, hidden)
    loss = LinearConsistencyFunction.apply(
        hidden.reshape(count, H), other_hidden.reshape(count, H), lm_head, bias,
        None if mask is None else mask.reshape(count), divisor, kind, torch.is_grad_enabled(), dtype, backend,
    )  # fmt: skip
    return loss.reshape(lead) if reduction == "none" else loss


def _check_first(where: str, name: str, x: Tensor, wanted: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: {name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{where}: {name} must be {', '.join(map(str, _DTYPES))}, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{where}: {name} must be {wanted}, got {tuple(x.shape)}")


def _check_options(where: str, kind: str, mask: Tensor | None, reduction: str, model_name: str, model: Tensor) -> None:
    if kind not in KINDS:
        raise ValueError(f"{where}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{where}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if mask is not None:
        check_like(where, "mask", mask, f"the rows of {model_name}", model.shape[:-1], (torch.bool,), model.device)


def _divisor(reduction: str, mask: Tensor | None, lead: tuple, V: int, like: Tensor) -> Tensor:
    """What the sum of the rows is divided by, 0-d: at least 1, so that no row at all gives 0."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if reduction == "sum":
        return torch.ones((), dtype=dtype, device=like.device)
    entries = V if reduction == "mean" else 1
    if mask is None:
        return torch.full((), max(math.prod(lead), 1) * entries, dtype=dtype, device=like.device)
    return mask.sum(dtype=dtype).clamp(min=1) * entries

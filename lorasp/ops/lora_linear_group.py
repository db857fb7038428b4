"""lora_linear_group: linear layers that read one input, as one operator with one autograd node.

    xa_i = s_i (D_i o x) A_i^T        y_i = x W_i^T + bias_i + xa_i B_i^T
    g_i  = s_i dy_i B_i               dx  = sum_i (D_i o (g_i A_i) + dy_i W_i)
    dB_i = dy_i^T xa_i                dA_i = g_i^T (D_i o x)

One pass over x gives every xa_i and x[:, J]; x, or x[:, J] where A_i trains on the features J only, is kept once; dx is
summed inside the node. A_i, B_i train whole or in part: the parts' layout is that of reference.lora_linear_group.
Member i's dropout mask takes members[i] as a counter word of the group's one seed. An output without a gradient costs
nothing in backward. Sources: LoRA arXiv 2106.09685; LoRA-FA arXiv 2308.03303; LoRA-SP arXiv 2403.08822.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasp.ops import registry
from lorasp.ops.lora_linear import as_rows, cast, refuse_plan, shaped
from lorasp.reference import lora_linear_group as reference

FORWARD_SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_As, Tensor[] lora_Bs, Tensor?[] frozen_As, "
    "Tensor?[] frozen_Bs, Tensor? columns, Tensor?[] rows, Tensor?[] entries_A, Tensor?[] entries_B, Tensor? seed, "
    "float[] scales, float dropout_p, int[] members, bool keep_columns, str plan, Tensor?[] packed) "
    "-> (Tensor[] ys, Tensor[] xas, Tensor x_columns)"
)
BACKWARD_SCHEMA = (
    "(Tensor[] dys, Tensor? x, Tensor? x_columns, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, "
    "Tensor?[] frozen_As, Tensor?[] frozen_Bs, Tensor? columns, Tensor?[] rows, Tensor?[] entries_A, "
    "Tensor?[] entries_B, Tensor?[] xas, Tensor? seed, Tensor?[] mask_As, Tensor?[] mask_Bs, float[] scales, "
    "float dropout_p, int[] members, int in_features, bool need_dx, bool[] need_dA, bool[] need_dB, str plan, "
    "Tensor?[] packed) -> (Tensor dx, Tensor[] dlora_As, Tensor[] dlora_Bs)"
)


class Members(NamedTuple):
    """The tensors of G members, field by field, each a sequence of G tensors or Nones."""

    weights: tuple
    biases: tuple
    lora_As: tuple
    lora_Bs: tuple
    frozen_As: tuple
    frozen_Bs: tuple
    rows: tuple
    entries_A: tuple
    entries_B: tuple
    mask_As: tuple
    mask_Bs: tuple
    packed_forward: tuple
    packed_backward: tuple


# Members whose factors train whole have the first four fields only.
_WHOLE = 4


def _fields(flat, count: int) -> list:
    """The fields of Members from the tensors of all of them, one after the other."""
    fields = [flat[i : i + count] for i in range(0, len(flat), count)]
    return fields + [(None,) * count] * (len(Members._fields) - len(fields))


def _rank(lora_A: Tensor, frozen_A: Tensor | None) -> int:
    return (lora_A if frozen_A is None else frozen_A).shape[0]


def _forward_fake(
    x, weights, biases, lora_As, lora_Bs, frozen_As, frozen_Bs, columns, rows, entries_A, entries_B, seed, scales,
    dropout_p, members, keep_columns, plan, packed,
):  # fmt: skip
    M = x.shape[0]
    ranks = [_rank(a, frozen) for a, frozen in zip(lora_As, frozen_As, strict=True)]
    return (
        [x.new_empty((M, weight.shape[0])) for weight in weights],
        [x.new_empty((M, rank)) for rank in ranks],
        x.new_empty((M, columns.shape[0])) if keep_columns else x.new_empty(0),
    )


def _backward_fake(
    dys, x, x_columns, weights, lora_As, lora_Bs, frozen_As, frozen_Bs, columns, rows, entries_A, entries_B, xas, seed,
    mask_As, mask_Bs, scales, dropout_p, members, in_features, need_dx, need_dA, need_dB, plan, packed,
):  # fmt: skip
    nothing = dys[0].new_empty
    return (
        dys[0].new_empty((dys[0].shape[0], in_features)) if need_dx else nothing(0),
        [a.new_empty(a.shape) if need else nothing(0) for a, need in zip(lora_As, need_dA, strict=True)],
        [b.new_empty(b.shape) if need else nothing(0) for b, need in zip(lora_Bs, need_dB, strict=True)],
    )


def _forward_reference(x, *arguments):
    *arguments, plan, _ = arguments
    refuse_plan("reference", plan)
    with registry.autocast_off(x.device.type):
        return reference.forward(x, *arguments)


def _backward_reference(dys, *arguments):
    with registry.autocast_off(dys[0].device.type):
        return reference.backward(dys, *arguments[:-2])


def _forward_triton(x, *arguments):
    kernels = registry.triton_kernels("lora_linear_group")
    with registry.autocast_off(x.device.type):
        return kernels.forward(x, *arguments[:-1])


def _backward_triton(dys, *arguments):
    kernels = registry.triton_kernels("lora_linear_group")
    with registry.autocast_off(dys[0].device.type):
        return kernels.backward(dys, *arguments[:-1])


forward_ops = registry.declare(
    "lora_linear_group_fwd", FORWARD_SCHEMA, _forward_fake,
    {"reference": _forward_reference, "triton": _forward_triton},
)  # fmt: skip
backward_ops = registry.declare(
    "lora_linear_group_bwd", BACKWARD_SCHEMA, _backward_fake,
    {"reference": _backward_reference, "triton": _backward_triton},
)  # fmt: skip


class LoRALinearGroupFunction(torch.autograd.Function):
    """Forward and backward of lora_linear_group over the raw ops of one backend; second derivatives raise.

    how: (scales, dropout_p, members, keep_input, compute dtype, backend, plan), one argument because each costs time.
    flat: Members, field after field, or the first four fields where the others are all None. keep_input: save x itself
    where only x[:, columns] is needed, because something else keeps x alive anyway.
    """

    @staticmethod
    def forward(ctx, x, seed, columns, how, *flat):
        scales, dropout_p, members, keep_input, dtype, backend, plan = how
        count = len(scales)
        needs = ctx.needs_input_grad
        whole = len(flat) == _WHOLE * count
        m = Members._make(_fields(flat, count))
        need_weights, _, need_As, need_Bs = [needs[i : i + count] for i in range(4, 4 + 4 * count, count)]
        need_x, need_A = needs[0], True in need_As
        save_x = True in need_weights or (need_A and (columns is None or keep_input))
        keep_columns = need_A and not save_x
        ys, xas, x_columns = forward_ops[backend](
            as_rows(x, dtype), [cast(w, dtype) for w in m.weights], [cast(b, dtype) for b in m.biases], m.lora_As,
            m.lora_Bs, m.frozen_As, m.frozen_Bs, columns, m.rows, m.entries_A, m.entries_B, seed, scales, dropout_p,
            members, keep_columns, plan, m.packed_forward,
        )  # fmt: skip
        needed = need_x or need_A or True in need_Bs
        nothing = (None,) * count
        lora = flat[2 * count : 4 * count] if needed else nothing + nothing
        saved = [xa if trains else None for xa, trains in zip(xas, need_Bs, strict=True)]
        saved += [*(m.weights if need_x else nothing), *lora]
        if not whole:
            parts = m[4:9] if needed else (nothing,) * 5
            saved += [tensor for part in parts for tensor in part]  # Dynamo of torch 2.11 refuses an iterator
            saved += [mask if trains else None for mask, trains in zip(m.mask_As, need_As, strict=True)]
            saved += [mask if trains else None for mask, trains in zip(m.mask_Bs, need_Bs, strict=True)]
            saved += m.packed_backward if need_x else nothing
        ctx.save_for_backward(
            x if save_x else None,
            x_columns if keep_columns else None,
            seed if need_x or need_A else None,
            columns if needed else None,
            *saved,
        )
        ctx.set_materialize_grads(False)
        ctx.constants = (
            x.shape, x.dtype, [w.dtype for w in m.weights], [b is not None and b.dtype for b in m.biases], scales,
            dropout_p, members, dtype, backend, plan,
        )  # fmt: skip
        return tuple(ys) if x.ndim == 2 else tuple([shaped(y, x) for y in ys])

    @staticmethod
    def backward(ctx, *dys):
        return _backward_once(ctx, *dys) if torch.is_grad_enabled() else _backward(ctx, *dys)


def _backward(ctx, *dys):
    x_shape, x_dtype, weight_dtypes, bias_dtypes, scales, dropout_p, members, dtype, backend, plan = ctx.constants
    count = len(scales)
    x, x_columns, seed, columns, *flat = ctx.saved_tensors
    needs = ctx.needs_input_grad
    need_weights, need_biases, need_As, need_Bs = (needs[i : i + count] for i in range(4, 4 + 4 * count, count))
    used = [i for i in range(count) if dys[i] is not None]
    dys = [dys[i].reshape(-1, dys[i].shape[-1]) for i in used]
    need_A, need_B = [need_As[i] for i in used], [need_Bs[i] for i in used]
    dx = None
    dweights, dbiases, dlora_As, dlora_Bs = [None] * count, [None] * count, [None] * count, [None] * count
    rows_x = None if x is None else as_rows(x, dtype)
    if used and (needs[0] or True in need_A or True in need_B):
        # As in Members, but for xas first instead of the biases, and one packed weight.
        fields = _fields(flat, count)[: len(Members._fields) - 1]
        if len(used) < count:
            fields = [[field[i] for i in used] for field in fields]
        xas, weights, lora_As, lora_Bs, frozen_As, frozen_Bs, rows, entries_A, entries_B, mask_As, mask_Bs, packed = (
            fields
        )
        trains_A = True in need_A
        if trains_A and columns is not None and x_columns is None:
            x_columns = rows_x.index_select(1, columns)
        weights = [cast(w, dtype) for w in weights] if needs[0] else [dys[0].new_empty((0, 0))] * len(used)
        dx, das, dbs = backward_ops[backend](
            dys, rows_x if trains_A and columns is None else None, x_columns if trains_A else None, weights, lora_As,
            lora_Bs, frozen_As, frozen_Bs, columns, rows, entries_A, entries_B, xas, seed, mask_As, mask_Bs,
            [scales[i] for i in used], dropout_p, [members[i] for i in used], x_shape[-1], needs[0], need_A, need_B,
            plan, packed,
        )  # fmt: skip
        dx = cast(dx if len(x_shape) == 2 else dx.reshape(x_shape), x_dtype) if needs[0] else None
        for i, trains_A, trains_B, da, db in zip(used, need_A, need_B, das, dbs, strict=True):
            dlora_As[i], dlora_Bs[i] = da if trains_A else None, db if trains_B else None
    if True in need_weights or True in need_biases:
        for dy, i in zip(dys, used, strict=True):
            dweights[i] = (dy.t() @ rows_x).to(weight_dtypes[i]) if need_weights[i] else None
            dbiases[i] = dy.sum(0).to(bias_dtypes[i]) if need_biases[i] else None
    rest = (None,) * (len(needs) - 4 - 4 * count)
    return dx, None, None, None, *dweights, *dbiases, *dlora_As, *dlora_Bs, *rest


# With grad mode on (create_graph=True) the result must refuse to be differentiated again.
_backward_once = once_differentiable(_backward)


class LoRALinearPartFunction(torch.autograd.Function):
    """LoRALinearGroupFunction for one member without packed weight or trainable weight: less Python time per call.

    It saves the same tensors in the same order: a layer may use one in forward and the other in its recompute
    (activation checkpointing), which must not show.
    """

    @staticmethod
    def forward(
        ctx, x, seed, columns, how, weight, bias, lora_A, lora_B, frozen_A, frozen_B, rows, entries_A, entries_B,
    ):  # fmt: skip
        scales, dropout_p, members, keep_input, dtype, backend, plan = how
        need_x, _, _, _, _, _, need_A, need_B, *_ = ctx.needs_input_grad
        save_x = need_A and (columns is None or keep_input)
        keep_columns = need_A and not save_x
        (y,), (xa,), x_columns = forward_ops[backend](
            as_rows(x, dtype), [cast(weight, dtype)], [cast(bias, dtype)], [lora_A], [lora_B], [frozen_A], [frozen_B],
            columns, [rows], [entries_A], [entries_B], seed, scales, dropout_p, members, keep_columns, plan, [None],
        )  # fmt: skip
        if need_x or need_A or need_B:
            ctx.save_for_backward(
                x if save_x else None, x_columns if keep_columns else None, seed if need_x or need_A else None, columns,
                xa if need_B else None, weight if need_x else None, lora_A, lora_B, frozen_A, frozen_B, rows, entries_A,
                entries_B,
            )  # fmt: skip
        ctx.constants = how, x.shape, x.dtype
        return shaped(y, x)

    @staticmethod
    def backward(ctx, dy):
        return _part_backward_once(ctx, dy) if torch.is_grad_enabled() else _part_backward(ctx, dy)


def _part_backward(ctx, dy):
    (scales, dropout_p, members, _, dtype, backend, plan), x_shape, x_dtype = ctx.constants
    x, x_columns, seed, columns, xa, weight, lora_A, lora_B, frozen_A, frozen_B, rows, entries_A, entries_B = (
        ctx.saved_tensors
    )
    need_x, _, _, _, _, _, need_A, need_B, *_ = ctx.needs_input_grad
    dy = dy if dy.ndim == 2 else dy.reshape(-1, dy.shape[-1])
    if x is not None:
        x = as_rows(x, dtype)
        if columns is not None:
            x, x_columns = None, x.index_select(1, columns)
    dx, (dlora_A,), (dlora_B,) = backward_ops[backend](
        [dy], x, x_columns, [cast(weight, dtype) if need_x else dy.new_empty((0, 0))], [lora_A], [lora_B], [frozen_A],
        [frozen_B], columns, [rows], [entries_A], [entries_B], [xa], seed, [None], [None], scales, dropout_p, members,
        x_shape[-1], need_x, [need_A], [need_B], plan, [None],
    )  # fmt: skip
    dx = cast(dx if len(x_shape) == 2 else dx.reshape(x_shape), x_dtype) if need_x else None
    rest = (None,) * 5
    return dx, None, None, None, None, None, dlora_A if need_A else None, dlora_B if need_B else None, *rest


_part_backward_once = once_differentiable(_part_backward)

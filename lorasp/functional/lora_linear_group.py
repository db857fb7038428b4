"""lora_linear_group: validate, choose a backend, call the operator."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorasp.functional.arguments import (
    autocast_dtype,
    check_dropout,
    check_tensor,
    compute_dtypes,
    effective_rate,
    factor,
    seed_tensor,
)
from lorasp.functional.lora_linear import PackedWeight
from lorasp.ops import registry
from lorasp.ops.lora_linear_group import LoRALinearGroupFunction, LoRALinearPartFunction, Members

__all__ = [
    "Constants",
    "LoRALinearGroupFunction",
    "LoRALinearPartFunction",
    "Partial",
    "constants",
    "lora_linear_group",
]

Optional = Sequence[Tensor | None] | None


class Partial(NamedTuple):
    """Which entries of A and B train (LoRA-SP); every field may be None. Indices are int64, sorted, without repeats.

    columns (|J|,): the input features on which every training A of the group trains. A member's lora_A is then
        (R, |J|) with the whole A, of which columns J are not read, in frozen_As; or whole, with None in frozen_As, and
        its gradient is zero outside J.
    entries_A, entries_B: per member flat indices (n,) into A (R, K), B (N, R); lora_A, lora_B are then (n,), and the
        whole A is in frozen_As, the whole B in frozen_Bs (None: zeros).
    rows: per member the output features (|I|,) on which B trains. lora_B is then (|I|, R) with the whole B in frozen_Bs
        (None: zeros, whose output features cost nothing); or whole, and its gradient is zero outside I.
    """

    columns: Tensor | None = None
    frozen_As: Optional = None
    frozen_Bs: Optional = None
    rows: Optional = None
    entries_A: Optional = None
    entries_B: Optional = None


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Optional = None,
    *,
    scales: float | Sequence[float] = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    mask_As: Optional = None,
    mask_Bs: Optional = None,
    partial: Partial | None = None,
    members: Sequence[int] | None = None,
    keep_input: bool = False,
    plan: str = "auto",
    packed: Sequence[PackedWeight | None] | None = None,
) -> tuple[Tensor, ...]:
    """y_i = x W_i^T + bias_i + s_i (D_i o x) A_i^T B_i^T for G layers that read one input: x is read and kept once.

    x (..., K), weights [(N_i, K)], biases [(N_i,) or None], lora_As [(R_i, K)], lora_Bs [(N_i, R_i)] -> G tensors
    (..., N_i). Everything else is lora_linear's, per member: dtypes, masks, autocast, gradients. The gradient of x is
    summed inside the one autograd node; an output that is not used adds nothing to it, and its adapter's gradient is
    None.

    dropout_p is the group's; members (default 0 ... G-1) tells the members' masks of one seed apart, so that a member
    computed alone with its number gives the same function. partial: see Partial; backward then keeps x[:, J] (M, |J|)
    instead of x, or x itself with keep_input (for an x that something else keeps alive).

    Raises TypeError and ValueError for arguments that do not fit, RuntimeError for second derivatives.
    Source: LoRA arXiv 2106.09685 eq. 3; LoRA-FA arXiv 2308.03303 section 3; LoRA-SP arXiv 2403.08822 (its abstract says
    that half of the parameters is frozen; which granularity is ours to choose).
    """
    where = "lora_linear_group"
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: x must be a Tensor, got {type(x).__name__}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{where}: x must be (..., K) with K >= 1, got {tuple(x.shape)}")
    _, inputs, low_rank = compute_dtypes(where, x, autocast_dtype(x))
    count = len(weights)
    if count == 0:
        raise ValueError(f"{where}: weights must hold at least one tensor, got {weights!r}")
    scales = [scales] * count if isinstance(scales, int | float) else list(scales)
    members = list(range(count)) if members is None else list(members)
    partial = partial or Partial()
    optional = {
        "biases": biases, "frozen_As": partial.frozen_As, "frozen_Bs": partial.frozen_Bs, "rows": partial.rows,
        "entries_A": partial.entries_A, "entries_B": partial.entries_B, "mask_As": mask_As, "mask_Bs": mask_Bs,
        "packed": packed,
    }  # fmt: skip
    lists = {"lora_As": lora_As, "lora_Bs": lora_Bs, "scales": scales, "members": members}
    lists |= {name: (None,) * count if value is None else value for name, value in optional.items()}
    for name, value in lists.items():
        if len(value) != count:
            raise ValueError(f"{where}: {name} must have one item per weight, {count}, got {len(value)}")
    packed = [pair or (None, None) for pair in lists["packed"]]
    m = Members(
        weights, lists["biases"], lora_As, lora_Bs, *(lists[name] for name in Members._fields[4:11]),
        [pair[0] for pair in packed], [pair[1] for pair in packed],
    )  # fmt: skip
    for i in range(count):
        _check_member(where, x, Members(*(field[i] for field in m)), i, partial.columns, inputs, low_rank)
        if not isinstance(scales[i], int | float) or not -math.inf < scales[i] < math.inf:
            raise ValueError(f"{where}: scales must be finite numbers, got {scales[i]!r}")
        if not isinstance(members[i], int) or isinstance(members[i], bool) or not 0 <= members[i] < 2**32:
            raise ValueError(f"{where}: members must be ints in [0, 2^32), got {members[i]!r}")
    if plan not in registry.PLANS:
        raise ValueError(f"{where}: plan must be one of {', '.join(registry.PLANS)}, got {plan!r}")
    check_dropout(where, dropout_p)
    how = constants(x, weights, scales, dropout_p, members, keep_input, plan)
    low_rank = [None if t is None else factor(t, how.dtype) for field in m[2:6] for t in field]
    rest = [*low_rank[2 * count :], *itertools.chain.from_iterable(m[6:])]
    return LoRALinearGroupFunction.apply(
        x, seed_tensor(where, seed, x.device) if how.dropout_p else None, partial.columns, tuple(how), *weights,
        *m.biases, *low_rank[: 2 * count], *(rest if any(t is not None for t in rest) else ()),
    )  # fmt: skip


class Constants(NamedTuple):
    """What LoRALinearGroupFunction takes besides tensors."""

    scales: tuple[float, ...]
    dropout_p: float
    members: tuple[int, ...]
    keep_input: bool
    dtype: torch.dtype
    backend: str
    plan: str


def constants(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[float],
    dropout_p: float,
    members: Sequence[int],
    keep_input: bool,
    plan: str,
) -> Constants:
    """Everything about a call that is no tensor, from arguments that were checked."""
    dtype = autocast_dtype(x) or x.dtype
    out_features = sum([weight.shape[0] for weight in weights])
    backend, plan = registry.choose_linear("lora_linear_group", x, out_features, dtype, plan)
    return Constants(
        tuple([float(scale) for scale in scales]),
        effective_rate(dropout_p),
        tuple(members),
        keep_input,
        dtype,
        backend,
        plan,
    )


def _check_member(where, x, m, i, columns, inputs, low_rank) -> None:
    """m: Members of one tensor each, all of member i."""
    device, k = x.device, x.shape[-1]

    def check(name, tensor, shape, wanted, dtypes):
        check_tensor(where, f"{name}[{i}]", tensor, shape, wanted, dtypes, device)

    check("weights", m.weights, (-1, k), "(N, {1})", inputs)
    n = m.weights.shape[0]
    if m.biases is not None:
        check("biases", m.biases, (n,), "({0},)", inputs)
    if m.frozen_As is not None:
        check("frozen_As", m.frozen_As, (-1, k), "(R, {1}) with R >= 1", low_rank)
        r = m.frozen_As.shape[0]
        if m.entries_A is not None:
            if columns is not None:
                raise ValueError(f"{where}: entries_A[{i}] must be None where columns are given")
            check("entries_A", m.entries_A, (-1,), "(n,)", (torch.int64,))
            check("lora_As", m.lora_As, (m.entries_A.shape[0],), "({0},), one per entry", low_rank)
        elif columns is not None:
            check_tensor(where, "columns", columns, (-1,), "(|J|,)", (torch.int64,), device)
            check("lora_As", m.lora_As, (r, columns.shape[0]), "({0}, {1}), one column per index", low_rank)
        else:
            raise ValueError(f"{where}: frozen_As[{i}] must come with columns or entries_A")
    else:
        if m.entries_A is not None:
            raise ValueError(f"{where}: entries_A[{i}] must come with frozen_As")
        check("lora_As", m.lora_As, (-1, k), "(R, {1}) with R >= 1", low_rank)
        r = m.lora_As.shape[0]
    if m.frozen_Bs is not None:
        check("frozen_Bs", m.frozen_Bs, (n, r), "({0}, {1})", low_rank)
    if m.entries_B is not None:
        check("entries_B", m.entries_B, (-1,), "(n,)", (torch.int64,))
        check("lora_Bs", m.lora_Bs, (m.entries_B.shape[0],), "({0},), one per entry", low_rank)
    elif m.rows is not None:
        check("rows", m.rows, (-1,), "(|I|,)", (torch.int64,))
        whole = isinstance(m.lora_Bs, Tensor) and m.frozen_Bs is None and m.lora_Bs.shape[:1] == (n,)
        check("lora_Bs", m.lora_Bs, (n if whole else m.rows.shape[0], r), "({0}, {1}), one row per index", low_rank)
    else:
        check("lora_Bs", m.lora_Bs, (n, r), "({0}, {1})", low_rank)
    for name, mask, lora, shape in (
        ("mask_As", m.mask_As, m.lora_As, (r, k)),
        ("mask_Bs", m.mask_Bs, m.lora_Bs, (n, r)),
    ):
        if mask is not None:
            check(name, mask, shape, "({0}, {1})", (torch.bool,))
            if lora.shape != shape:
                raise ValueError(f"{where}: {name}[{i}] must be None where only a part trains")

"""What `lorasp bench --op dropkey_attention` times, and on GPUs the bounds this project set itself.

On a CPU the base is torch's scaled_dot_product_attention as it comes. On CUDA it is torch's FlashAttention backend,
beside it cuDNN's, and FlashAttention with dropout 0.1, which is what models train with today. A backend that refuses
the call, and what would not fit into the device's memory, is left out with the reason.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lorasp import rng
from lorasp.bench.entries import Entry, entry, normal
from lorasp.bench.targets import Target
from lorasp.bench.timing import give_back
from lorasp.functional import dropkey_attention

SEED = 3
CPU_SHAPES = ((4, 12, 512, 64), (1, 16, 2048, 64))
# 16384 tokens of a model 2048 wide.
CUDA_SHAPES = tuple(
    (16384 // tokens, 2048 // head_dim, tokens, head_dim)
    for head_dim, tokens in itertools.product((64, 128), (2048, 4096, 8192, 16384))
)
DEFAULT, FLASH, CUDNN = "SDPA, no drop", "SDPA flash, no drop", "SDPA cuDNN, no drop"
FLASH_DROPOUT, MASK, EAGER = "SDPA flash, dropout", "SDPA, mask", "logits, masked_fill, softmax"
_DROPOUT_P = 0.1
_MASK_RATES = (0.1, 0.3)
# Tensors of one value per logit alive at once in forward and backward, beside the bool masks of _MASK_RATES: additive
# masks; logits, masked logits, weights and their gradients.
_COPIES = {MASK: 2, EAGER: 6}


def entries(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, rates: Sequence[float], causal: bool,
    *, backends: bool,
) -> tuple[list[Entry], dict[str, str]]:  # fmt: skip
    """(what is timed, the base first; name -> why it is not). backends: torch's backends one by one, as on CUDA."""
    b, h, s, d = sizes
    torch.manual_seed(SEED)
    # As models have them: (B, S, H, D), transposed.
    q, k, v = (normal(b, s, h, d, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for _ in range(3))
    do = normal(b, s, h, d, dtype=dtype, device=device).transpose(1, 2)
    make = functools.partial(entry, inputs=(q, k, v), gradient=do)

    def kept(rate: float) -> Tensor:
        keep = rng.keep_mask(torch.tensor(SEED, device=device), (b, h, 1, s), rate, rng.PURPOSE_DROPKEY)
        return keep & torch.ones(s, s, dtype=torch.bool, device=device).tril() if causal else keep

    def eager(keep: Tensor) -> Tensor:
        logits = (q @ k.transpose(-1, -2) * d**-0.5).masked_fill(~keep, torch.finfo(dtype).min)
        return logits.softmax(-1) @ v

    sdpa = functools.partial(scaled_dot_product_attention, q, k, v, is_causal=causal)
    found, unavailable = [], {}
    if backends:
        flash = functools.partial(_on, SDPBackend.FLASH_ATTENTION, sdpa)
        for candidate in (
            make(FLASH, None, flash),
            make(CUDNN, None, functools.partial(_on, SDPBackend.CUDNN_ATTENTION, sdpa)),
            make(FLASH_DROPOUT, _DROPOUT_P, functools.partial(flash, dropout_p=_DROPOUT_P)),
        ):
            if reason := refusal(candidate):
                unavailable[candidate.name] = reason
            else:
                found.append(candidate)
    if FLASH not in (one.name for one in found):
        found.insert(0, make(DEFAULT, None, sdpa))
    for rate in rates:
        for pattern in ("column", "element") if rate else ("column",):
            call = functools.partial(
                dropkey_attention, q, k, v, dropout_p=rate, pattern=pattern, is_causal=causal, seed=SEED
            )
            found.append(make(f"lorasp {pattern}", rate, call))
        if rate not in _MASK_RATES:
            continue
        for name, call in ((MASK, functools.partial(scaled_dot_product_attention, q, k, v)), (EAGER, eager)):
            reason = too_large(name, sizes, dtype, device)
            if reason is None:
                candidate = make(name, rate, functools.partial(call, kept(rate)))
                reason = refusal(candidate) if backends else None
            if reason is None:
                found.append(candidate)
            else:
                unavailable[name] = reason
    return found, unavailable


def _on(backend: SDPBackend, call: Callable[..., Tensor], **arguments) -> Tensor:
    with sdpa_kernel(backend):
        return call(**arguments)


def refusal(candidate: Entry) -> str | None:
    """Why torch does not run an entry, with the hints it warns of; None where it does."""
    with warnings.catch_warnings(record=True) as hints:
        warnings.simplefilter("always")
        try:
            candidate.step()
        except RuntimeError as error:
            told = [str(hint.message).partition(" (Triggered")[0] for hint in hints]
            return " ".join([str(error).splitlines()[0], *dict.fromkeys(told)])
    return None


def too_large(name: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why an entry that holds tensors of logits does not fit into what the GPU has free; None on a CPU."""
    b, h, s, _ = sizes
    needed, free = b * h * s * s * (len(_MASK_RATES) + _COPIES[name] * dtype.itemsize), free_bytes(device)
    if free is None or needed <= free:
        return None
    return f"tensors of {b}×{h}×{s}×{s} logits take {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


def free_bytes(device: torch.device) -> int | None:
    give_back(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def targets(rows: Sequence) -> list[Target]:
    """The bounds that the rows of one contest speak about; none where FlashAttention is not the base."""
    column = next((row for row in rows if (row.name, row.rate) == ("lorasp column", _DROPOUT_P)), None)
    if column is None or rows[0].name != FLASH:
        return []
    variant = f"{column.name} p = {column.rate:g}"
    found = [Target(variant, "forward + backward over flash without drop", column.ratio, 1.0)]
    for row in rows:
        if row.name == FLASH_DROPOUT:
            found.append(Target(variant, f"over flash with dropout {row.rate:g}", column.ratio / row.ratio, 0.8))
    return found

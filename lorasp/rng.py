"""The one definition of every random mask: Philox 4x32 with 7 rounds, counter-based, in plain PyTorch.

Element i (row-major linear index in the mask's logical shape, 64 bits) takes 16-bit half i mod 8, low half of word 0
first, of philox(counter = (lo32(i div 8), hi32(i div 8), purpose, member), key = (lo32(seed), hi32(seed))). It is kept
iff half >= t with t = round(p * 65536); kept values are multiplied by 65536 / (65536 - t), which is exactly unbiased.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (7 rounds pass BigCrush).
"""

import math

import torch
from torch import Tensor

PURPOSE_LORA_DROPOUT = 0
PURPOSE_DROPKEY = 1
PURPOSE_HIDDEN_CUT = 2

_LO32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7


def threshold(p: float) -> int:
    """t = round(p * 65536): an element is dropped iff its 16-bit number is below t. p in [0, 1)."""
    return round(p * 65536)


def rescale(p: float) -> float:
    """65536 / (65536 - t), the factor of kept elements; 1.0 where t = 0."""
    return 65536.0 / (65536 - threshold(p))


def _multiply(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * multiplier for a in [0, 2^32), held in int64 without overflow."""
    low, high = a * (multiplier & 0xFFFF), a * (multiplier >> 16)
    carry = (low >> 16) + high
    return carry >> 16, ((carry & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Philox 4x32-7: four int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LO32, (k1 + _WEYL[1]) & _LO32
    return [c0, c1, c2, c3]


def _seed_tensor(seed: int | Tensor) -> tuple[Tensor, torch.device]:
    if isinstance(seed, Tensor):
        return seed, seed.device
    device = torch.device("cpu")
    return torch.full((), seed, dtype=torch.int64, device=device), device


def _key(seed: Tensor) -> tuple[Tensor, Tensor]:
    return seed & _LO32, (seed >> 32) & _LO32


def keep_mask(seed: int | Tensor, shape: tuple[int, ...], p: float, purpose: int, member: int = 0) -> Tensor:
    """Boolean mask of `shape`, True where an element is kept, with P(keep) = 1 - t/65536.

    seed: int in [-2^63, 2^63) or a 0-d int64 tensor, whose device the mask lives on; purpose: which operator draws
    (0 LoRA dropout, 1 dropkey, 2 hidden_cut); member: index inside a group that shares one seed. Raises ValueError for
    p outside [0, 1).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"keep_mask: p must be in [0, 1), got {p}")
    seed, device = _seed_tensor(seed)
    count = math.prod(shape)
    block = torch.arange((count + 7) // 8, dtype=torch.int64, device=device)
    words = philox(
        (block & _LO32, block >> 32, torch.full_like(block, purpose), torch.full_like(block, member)),
        _key(seed),
    )
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (halves.reshape(-1)[:count] >= threshold(p)).reshape(shape)


def span_length(p: float, size: int) -> int:
    """Length of the dropped run of `size` positions: 0 if p = 0, else min(size - 1, max(1, int(p * size)))."""
    return 0 if p == 0.0 else max(0, min(size - 1, max(1, int(p * size))))


def span_start(seed: int | Tensor, count: int, size: int, p: float, purpose: int) -> Tensor:
    """First dropped position of `count` independent runs, (count,) int64 in [0, size - span_length(p, size)].

    Run i takes word 0 of philox(counter = (lo32(i), hi32(i), purpose, 0)) modulo the number of places it has.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"span_start: p must be in [0, 1), got {p}")
    seed, device = _seed_tensor(seed)
    index = torch.arange(count, dtype=torch.int64, device=device)
    counter = (index & _LO32, index >> 32, torch.full_like(index, purpose), torch.zeros_like(index))
    return philox(counter, _key(seed))[0] % (size - span_length(p, size) + 1)


def span_keep_mask(seed: int | Tensor, shape: tuple[int, ...], p: float, purpose: int) -> Tensor:
    """Boolean mask of `shape`, False on one contiguous run of each row: row i (flattened) is span_start's run i."""
    *rows, size = shape
    start = span_start(seed, math.prod(rows), size, p, purpose).unsqueeze(-1)
    position = torch.arange(size, dtype=torch.int64, device=start.device)
    return ((position < start) | (position >= start + span_length(p, size))).reshape(shape)


def draw_seed(device: torch.device) -> Tensor:
    """A 0-d int64 seed from torch's generator of `device`: no host sync, reproduced by torch.manual_seed."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)

"""The dropout mask on the device: Philox 4x32 with 7 rounds, one call for eight elements.

Element i (row-major index in the mask's logical shape, 64 bits) owns 16-bit half i mod 8, low half of word 0 first, of
philox(counter = (lo32(i div 8), hi32(i div 8), purpose, member), key = (lo32(seed), hi32(seed))) and is kept iff that
half >= threshold. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import triton
import triton.language as tl

PURPOSE_LORA_DROPOUT = 0


def span_length(p: float, S: int) -> int:
    """Positions of S that a span drops at rate p: one at least, never all; none at p = 0."""
    return min(S - 1, max(1, int(p * S))) if p > 0.0 else 0


@triton.jit
def _keep_byte(seed, group, purpose: tl.constexpr, member, threshold):
    """The keep bits of elements 8·group … 8·group + 7, lowest first, for int64 `group`."""
    low = group.to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0 + purpose, low * 0 + member, n_rounds=7)
    bits = _keep_pair(w0, threshold) | _keep_pair(w1, threshold) << 2
    return bits | _keep_pair(w2, threshold) << 4 | _keep_pair(w3, threshold) << 6


@triton.jit
def _keep_pair(word, threshold):
    low = ((word & 0xFFFF) >= threshold).to(tl.int32)
    high = ((word >> 16) >= threshold).to(tl.int32)
    return low | high << 1


@triton.jit
def _unpack(byte, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """keep (BLOCK_M, BLOCK_K) from the lowest eight bits of byte (BLOCK_M, BLOCK_K / 8)."""
    # Packed, because the mask changes layout on its way to the tile it masks; joined before that, because the compiler
    # would otherwise move the whole generator into the tile's layout, where four threads share a group of eight.
    nibbles = tl.join(byte & 15, (byte >> 4) & 15).to(tl.int8)  # (BLOCK_M, BLOCK_K / 8, 2)
    keep = (nibbles[:, :, :, None] >> tl.arange(0, 4).to(tl.int8)[None, None, None, :]) & 1
    return tl.reshape(keep, (BLOCK_M, BLOCK_K)) != 0


@triton.jit
def keep_mask(
    seed, offs_m, start_k, K, threshold, member, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr, PURPOSE: tl.constexpr = 0
):
    """keep (BLOCK_M, BLOCK_K) of rows `offs_m` and columns start_k … start_k + BLOCK_K − 1 of an (M, K) mask.

    ALIGNED asserts K % 8 == 0 and start_k % 8 == 0: one Philox call then serves its eight elements. Otherwise a row may
    start inside a group of eight, and every eight elements take their bits from the two groups they straddle.
    Entries outside the (M, K) mask are arbitrary.
    """
    first = offs_m.to(tl.int64) * K + start_k
    group = (first // 8)[:, None] + tl.arange(0, BLOCK_K // 8)[None, :]
    byte = _keep_byte(seed, group, PURPOSE, member, threshold)
    if not ALIGNED:
        byte |= _keep_byte(seed, group + 1, PURPOSE, member, threshold) << 8
        byte = byte >> (first % 8).to(tl.int32)[:, None]
    return _unpack(byte, offs_m.shape[0], BLOCK_K)


@triton.jit
def runs_of_eight(index_ptr, offs_c, C, K):
    """Whether index[offs_c] (sorted, those below C) are whole aligned groups of eight columns of an (M, K) mask."""
    first = tl.load(index_ptr + offs_c // 8 * 8, mask=offs_c < C, other=0)
    column = tl.load(index_ptr + offs_c, mask=offs_c < C, other=0)
    apart = ((column != first + offs_c % 8) | (first % 8 != 0)) & (offs_c < C)
    return (tl.sum(apart.to(tl.int32)) == 0) & (K % 8 == 0)


@triton.jit
def keep_columns(seed, offs_m, column, K, threshold, member, RUNS: tl.constexpr, PURPOSE: tl.constexpr = 0):
    """keep (BLOCK_M, BLOCK_C) of rows `offs_m` and the columns `column` (BLOCK_C,), int64, of an (M, K) mask.

    RUNS asserts what runs_of_eight tests; `column` (BLOCK_C / 8,) then names the first of every eight columns, and one
    Philox call serves them all. Otherwise every element takes a call.
    """
    element = (offs_m.to(tl.int64) * K)[:, None] + column[None, :]
    byte = _keep_byte(seed, element // 8, PURPOSE, member, threshold)
    if RUNS:
        return _unpack(byte, offs_m.shape[0], 8 * column.shape[0])
    else:
        return ((byte >> (element % 8).to(tl.int32)) & 1) != 0

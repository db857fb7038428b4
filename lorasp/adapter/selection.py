"""Which entries of A (R, K) and B (N, R) train (LoRA-SP): drawn from (seed, layer name), or chosen by scores.

A selection is two bool masks that broadcast to A and B:

    feature  (1, K), (N, 1)    columns of A (blocks of 64 where K >= 512), rows of B
    element  (R, K), (N, R)    single entries
    rank     (R, 1), (1, R)    rows of A, the same columns of B
    matrix   (1, 1), (1, 1)    all or nothing: A is frozen in one half of the modules, B in the other

Every draw takes the units with the highest numbers; the numbers are Philox words (lorasp.rng), keyed by a hash of
(seed, number of the draw, factor, name), so a selection is the same on every machine and with every torch.
"""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lorasp import rng
from lorasp.config import PartialConfig

BLOCK = 64
_BLOCKS_FROM = 512


class Site(NamedTuple):
    """The adapter a selection is for. shared: the name under which layers on one input draw one set of columns; peers:
    the names of all layers adapted together, this one included."""

    name: str
    shared: str
    peers: tuple[str, ...]
    in_features: int
    out_features: int
    r: int
    freeze_A: bool


class Selection(NamedTuple):
    """Bool masks that broadcast to A and B, True where they train; active_A is None where A is frozen anyway."""

    active_A: Tensor | None
    active_B: Tensor


def draw(partial: PartialConfig, site: Site, number: int = 0) -> Selection:
    """The `number`-th selection of this adapter. Raises ValueError if it would leave nothing of A or B to train."""

    def words(factor: str, name: str, count: int) -> Tensor:
        return _words(_key(partial.seed, number, factor, name), count)

    if partial.granularity == "matrix":
        order = sorted(site.peers, key=lambda name: (_key(partial.seed, number, "matrix", name), name))
        frozen_A = order.index(site.name) < (len(order) + 1) // 2
        return Selection(*(torch.tensor([[trains]], device="cpu") for trains in (not frozen_A, frozen_A)))
    units_A, units_B = _units(partial, site)
    if partial.granularity == "rank":
        words_A = words_B = words("rank", site.name, site.r)
    else:
        words_A = None if site.freeze_A else words("A", site.shared, math.prod(units_A))
        words_B = words("B", site.name, math.prod(units_B))
    return _highest(partial, site, words_A, words_B)


def by_scores(partial: PartialConfig, site: Site, score_A: Tensor | None, score_B: Tensor) -> Selection:
    """The units with the highest sums of scores per entry, (R, K) and (N, R); earlier ones where sums are equal.

    score_A must be None exactly where A is frozen anyway. Raises ValueError for scores that do not fit.
    """
    where = f"select: layer {site.name!r}"
    if partial.granularity == "matrix":
        raise ValueError(
            f"{where}: partial must not be of granularity 'matrix', which chooses among modules, by chance"
        )
    if (score_A is None) is not site.freeze_A:
        raise ValueError(f"{where}: score_A must be {'None (A is frozen)' if site.freeze_A else 'given'}")
    shapes = {"score_A": (site.r, site.in_features), "score_B": (site.out_features, site.r)}
    for name, score in (("score_A", score_A), ("score_B", score_B)):
        if name == "score_A" and score is None:
            continue
        got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        if got != shapes[name]:
            raise ValueError(f"{where}: {name} must be {shapes[name]}, got {got}")
        if not score.isfinite().all():
            raise ValueError(f"{where}: {name} must be finite")
    score_A, score_B = (None if s is None else s.detach().to("cpu", torch.float64) for s in (score_A, score_B))
    if partial.granularity == "rank":
        total = score_B.sum(0) if score_A is None else score_A.sum(1) + score_B.sum(0)
        return _highest(partial, site, total, total)
    if partial.granularity == "feature":
        if score_A is not None:
            units = _units(partial, site)[0][1]
            score_A = score_A.sum(0)
            if units < site.in_features:
                padded = torch.zeros(units * BLOCK, dtype=torch.float64, device="cpu")
                padded[: site.in_features] = score_A
                score_A = padded.view(units, BLOCK).sum(1)
        score_B = score_B.sum(1)
    return _highest(partial, site, None if score_A is None else score_A.flatten(), score_B.flatten())


def mask_shapes(partial: PartialConfig, site: Site) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """The shapes of active_A and active_B."""
    shape_A, shape_B = {
        "feature": ((1, site.in_features), (site.out_features, 1)),
        "element": ((site.r, site.in_features), (site.out_features, site.r)),
        "rank": ((site.r, 1), (1, site.r)),
        "matrix": ((1, 1), (1, 1)),
    }[partial.granularity]
    return None if site.freeze_A else shape_A, shape_B


def _units(partial: PartialConfig, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of what is chosen from: those of the masks, but for A's columns in blocks."""
    shape_A, shape_B = mask_shapes(partial, site._replace(freeze_A=False))
    if partial.granularity == "feature" and site.in_features >= _BLOCKS_FROM:
        shape_A = (1, -(-site.in_features // BLOCK))
    return shape_A, shape_B


def _highest(partial: PartialConfig, site: Site, words_A: Tensor | None, words_B: Tensor) -> Selection:
    """The round(ratio * n) units with the highest numbers, as masks."""
    shape_A, shape_B = mask_shapes(partial, site)

    def mask(factor: str, words: Tensor) -> Tensor:
        count = round(partial.trainable_ratio * words.numel())
        if count == 0:
            raise ValueError(
                f"PartialConfig: trainable_ratio {partial.trainable_ratio} leaves nothing of {factor} to train in "
                f"layer {site.name!r}: it has {words.numel()} unit(s) of granularity {partial.granularity!r}"
            )
        chosen = torch.zeros(words.numel(), dtype=torch.bool, device="cpu")
        chosen[words.argsort(descending=True, stable=True)[:count]] = True
        return chosen

    active_A = None
    if shape_A is not None:
        active_A = mask("lora_A", words_A)
        if active_A.numel() < math.prod(shape_A):
            active_A = active_A.repeat_interleave(BLOCK)[: site.in_features]
        active_A = active_A.reshape(shape_A)
    return Selection(active_A, mask("lora_B", words_B).reshape(shape_B))


def _key(seed: int, number: int, factor: str, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{number}/{factor}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _words(key: int, count: int) -> Tensor:
    """`count` numbers in [0, 2^63), int64."""
    block = torch.arange((count + 1) // 2, dtype=torch.int64, device="cpu")
    zero = torch.zeros_like(block)
    low, high = (torch.full_like(block, half) for half in (key & 0xFFFFFFFF, key >> 32))
    a, b, c, d = rng.philox((block, zero, zero, zero), (low, high))
    return torch.stack(((a >> 1 << 32) | b, (c >> 1 << 32) | d), dim=-1).flatten()[:count]

"""The mask definition: published Philox vectors, an independent scalar implementation, exact rates."""

import math

import pytest
import torch
from keep_bits import keep_at

from lorasp import rng


def words(*values):
    return tuple(torch.tensor([value], dtype=torch.int64) for value in values)


# Random123 1.14, kat_vectors, "philox4x32 7".
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ],
)
def test_philox_matches_published_vectors(counter, key, expected):
    assert " ".join(f"{word.item():08x}" for word in rng.philox(words(*counter), words(*key))) == expected


def scalar_philox(seed, block, purpose, member):
    """One counter's four words in plain Python integers."""
    counter = [block & 0xFFFFFFFF, block >> 32, purpose, member]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(7):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def scalar_keep(seed, index, p, purpose, member):
    """One element's decision in plain Python integers."""
    word = scalar_philox(seed, index // 8, purpose, member)[index % 8 // 2]
    return (word >> 16 * (index % 2)) & 0xFFFF >= round(p * 65536)


@pytest.mark.parametrize("seed", [0, 1, -3, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize(("purpose", "member"), [(0, 0), (1, 0), (2, 7)])
def test_keep_mask_matches_scalar_definition(seed, purpose, member):
    mask = rng.keep_mask(seed, (5, 13), 0.3, purpose, member)
    expected = [scalar_keep(seed & (2**64 - 1), index, 0.3, purpose, member) for index in range(65)]
    assert mask.reshape(-1).tolist() == expected
    far = torch.arange(2**45 - 9, 2**45 + 11)
    expected = [scalar_keep(seed & (2**64 - 1), index, 0.3, purpose, member) for index in far.tolist()]
    assert keep_at(far, seed, 0.3, purpose, member).tolist() == expected
    assert torch.equal(keep_at(torch.arange(65).view(5, 13), torch.tensor(seed), 0.3, purpose, member), mask)


@pytest.mark.parametrize(
    ("seed", "count", "p", "purpose", "member", "bits"),
    [
        (0x0123456789ABCDEF, 65, 0.5, 0, 0, "01011010000010100101010101000101110101000100110000001010000101011"),
        (-3, 40, 0.1, 2, 7, "1110110111111101111111111111111111110111"),
    ],
)
def test_keep_mask_vectors(seed, count, p, purpose, member, bits):
    assert "".join(str(int(bit)) for bit in rng.keep_mask(seed, (count,), p, purpose, member)) == bits


def test_seed_tensor_equals_int():
    seed = torch.tensor(-12345678901234, dtype=torch.int64)
    assert torch.equal(rng.keep_mask(seed, (3, 100), 0.5, 0), rng.keep_mask(seed.item(), (3, 100), 0.5, 0))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate_is_within_five_sigma_and_rescale_is_unbiased(p):
    count = 1 << 20
    kept = rng.keep_mask(7, (count,), p, 0).sum().item()
    exact = 1 - rng.threshold(p) / 65536
    assert abs(kept - count * exact) < 5 * math.sqrt(count * exact * (1 - exact))
    assert exact * rng.rescale(p) == pytest.approx(1.0, rel=1e-15)


def test_streams_differ_by_purpose_member_and_seed():
    masks = [rng.keep_mask(s, (4096,), 0.5, purpose, member) for s in (1, 2) for purpose in (0, 1) for member in (0, 1)]
    for i, first in enumerate(masks):
        for second in masks[i + 1 :]:
            assert 0.4 < (first == second).float().mean() < 0.6


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0, math.nan])
def test_p_outside_unit_interval_raises(p):
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\)"):
        rng.keep_mask(0, (4,), p, 0)


def test_zero_p_keeps_all_and_empty_mask_is_empty():
    assert rng.keep_mask(0, (100,), 0.0, 0).all()
    assert rng.keep_mask(0, (0, 7), 0.5, 0).shape == (0, 7)


@pytest.mark.parametrize(
    ("p", "size", "length"), [(0.0, 9, 0), (0.01, 9, 1), (0.34, 9, 3), (0.99, 9, 8), (0.99, 1, 0), (0.5, 0, 0)]
)
def test_span_drops_one_run_of_the_stated_length(p, size, length):
    mask = rng.span_keep_mask(5, (2, 3, size), p, 1)
    assert rng.span_length(p, size) == length
    for row, kept in enumerate(mask.reshape(6, size).tolist()):
        start = scalar_philox(5, row, 1, 0)[0] % (size - length + 1)
        assert kept == [not start <= position < start + length for position in range(size)]

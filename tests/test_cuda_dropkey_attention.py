"""dropkey_attention in CUDA C++: the lists of kept keys, executed on the CPU by the emulator."""

import ctypes

import pytest
import torch
from cuda_emulation.backend import ORDERS
from cuda_emulation.library import EmulationError, call, load, pointer

from lorasp import rng


def key_lists(rows, Sk, seed, p, order=0, faults=()):
    library = load("keys", *faults)
    library.emulated_set_order(ctypes.c_uint64(order))
    index, rank = (torch.full((rows, size), -1, dtype=torch.int32) for size in (Sk, Sk + 1))
    seed = torch.tensor(seed)
    call(
        library.emulated_keys, ctypes.c_int64(rows), ctypes.c_int64(Sk), pointer(seed),
        ctypes.c_uint32(rng.threshold(p)), pointer(index), pointer(rank),
    )  # fmt: skip
    return index, rank


def expected(rows, Sk, seed, p):
    keep = rng.keep_mask(seed, (rows, Sk), p, rng.PURPOSE_DROPKEY)
    rank = torch.nn.functional.pad(keep.cumsum(1), (1, 0))
    keys = torch.arange(Sk)
    index = torch.stack([torch.cat((keys[row], keys[~row].flip(0))) for row in keep])
    return index.int(), rank.int()


@pytest.mark.parametrize("order", ORDERS, ids=ORDERS.get)
@pytest.mark.parametrize(("rows", "Sk"), [(3, 1), (3, 7), (2, 8), (5, 100), (2, 2047), (1, 2048), (2, 2049), (3, 5000)])
def test_key_lists(rows, Sk, order):
    for seed, p in ((0, 0.1), (-(2**40) - 17, 0.5), (2**63 - 1, 0.97)):
        for have, want in zip(key_lists(rows, Sk, seed, p, order), expected(rows, Sk, seed, p), strict=True):
            assert torch.equal(have, want)


def test_rows_that_keep_everything_or_nothing():
    index, rank = key_lists(2, 300, 1, 0.0)
    assert torch.equal(index, torch.arange(300, dtype=torch.int32).expand(2, 300))
    assert torch.equal(rank, torch.arange(301, dtype=torch.int32).expand(2, 301))
    index, rank = key_lists(2, 30, 1, 65535 / 65536)
    assert rank.count_nonzero() == 0
    assert torch.equal(index, torch.arange(29, -1, -1, dtype=torch.int32).expand(2, 30))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (("  sync_threads();\n  int before = sum - count;", "  int before = sum - count;"), "is (read|written)"),
        (("step % 2 * kWarps", "0 * kWarps"), "is written without a barrier after a read|is read without a barrier"),
    ],
    ids=["a missing barrier", "one room for every step"],
)
def test_planted_races_are_caught(fault, message):
    with pytest.raises(EmulationError, match=message):
        key_lists(1, 5000, 1, 0.5, faults=[("dropkey_attention_keys.cuh", *fault)])

"""dropkey_attention in C++: every instruction set this machine runs against the reference by the rule."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lorasp
from lorasp import dropkey_attention, rng
from lorasp.testing.dropkey_attention import MASKS, PATTERNS, Case, check_case, make_inputs, run

_C = pytest.importorskip("lorasp._C", reason="the C++ extension is not built: the reference is in charge")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=_C.available_isas())
def isa(request):
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


@pytest.fixture
def poisoned():
    """The kernels' own memory is NaN before each use."""
    _C.poison_scratch(True)
    yield
    _C.poison_scratch(False)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_meets_the_rule(case):
    wrong = [result for result in check_case(case, "cpp") if not result.ok]
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "Dv"), [(1, 3), (8, 8), (33, 31), (64, 64), (80, 160), (256, 256)])
def test_head_dimensions(isa, poisoned, dtype, D, Dv):
    assert_meets_the_rule(Case(1, 2, 1, 37, 45, D, Dv, dtype, dropout_p=0.1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("Sq", "Sk"), [(8, 300), (300, 31), (65, 64), (257, 257)])
def test_lengths(isa, dtype, is_causal, Sq, Sk):
    """Several query blocks, several key blocks, ragged ends of both."""
    assert_meets_the_rule(Case(1, 2, 2, Sq, Sk, 16, 16, dtype, dropout_p=0.2, is_causal=is_causal))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Sq", "Sk", "D", "Dv"), [(1, 300, 64, 64), (3, 70, 20, 70), (4, 600, 33, 130)])
def test_few_queries_read_keys_and_values_in_place(isa, poisoned, dtype, Sq, Sk, D, Dv):
    for pattern, p, is_causal, mask in (
        ("column", 0.0, False, "none"), ("column", 0.2, False, "bool"), ("span", 0.2, False, "padding"),
        ("element", 0.2, False, "bias"), ("column", 0.1, False, "min"), ("column", 0.1, True, "none"),
    ):  # fmt: skip
        results = check_case(Case(2, 4, 2, Sq, Sk, D, Dv, dtype, pattern, p, is_causal, mask), "cpp")
        assert all(result.ok for result in results if result.tensor == "o"), results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_and_masks(isa, dtype, pattern, mask):
    for is_causal in (False, True):
        assert_meets_the_rule(Case(2, 2, 1, 40, 150, 16, 16, dtype, pattern, 0.4, is_causal, mask))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_scale(isa, dtype, scale):
    assert_meets_the_rule(Case(1, 2, 2, 40, 50, 8, 8, dtype, scale=scale, dropout_p=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_any_size(isa, dtype):
    """Maxima that grow from key block to key block: by less and by more than o's slack."""
    case = Case(1, 2, 2, 70, 700, 16, 16, dtype, scale=1.0)
    inputs = make_inputs(case)
    inputs["attn_mask"] = (torch.arange(700) * 0.05 + (torch.arange(700) // 300) * 40).expand(1, 1, 70, 700)
    reference64 = run({n: t.double() for n, t in inputs.items()}, case)
    with lorasp.use_backend("reference"):
        reference = run(inputs, case)
    with lorasp.use_backend("cpp"):
        for name, have in run(inputs, case).items():
            lorasp.testing.assert_close(have, reference[name], reference64[name], dtype, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_keys_are_not_read(isa, dtype):
    case = Case(2, 2, 2, 40, 90, 16, 16, dtype, dropout_p=0.3)
    inputs = make_inputs(case)
    kept = rng.keep_mask(case.seed + 1, (2, 2, 90, 1), 0.3, rng.PURPOSE_DROPKEY)
    poisoned = inputs | {name: inputs[name].masked_fill(~kept, float("nan")) for name in "kv"}
    with lorasp.use_backend("cpp"):
        want, have = run(inputs, case), run(poisoned, case)
    assert all(torch.equal(have[name], want[name]) for name in want)


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_not_hidden(isa, dtype, where):
    inputs = make_inputs(Case(1, 1, 1, 40, 50, 16, 16, dtype))
    inputs[where][0, 0, 7, 3] = float("nan")
    with lorasp.use_backend("cpp"):
        o = dropkey_attention(inputs["q"], inputs["k"], inputs["v"])
    expected = {"q": (slice(7, 8), slice(None)), "k": (slice(None), slice(None)), "v": (slice(None), slice(3, 4))}[
        where
    ]
    assert o[0, 0][expected].isnan().all()


CASES = [
    Case(1, 1, 1, 600, 300, 16, 16, dropout_p=0.1, is_causal=True),
    Case(1, 6, 2, 300, 300, 16, 16, dropout_p=0.1, mask="bias"),
    Case(3, 1, 1, 300, 70, 16, 16, torch.bfloat16, "element", 0.1),
]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bitwise_repeatable_at_any_thread_count(isa, threads, case, count):
    """More threads than heads: query blocks of one head, and heads of one key head, are summed in parts."""
    threads(count)
    assert_meets_the_rule(case)
    inputs = make_inputs(case)
    with lorasp.use_backend("cpp"):
        first, second = run(inputs, case), run(inputs, case)
    assert all(torch.equal(first[name], second[name]) for name in first)


PEAK = """
import sys, torch, lorasp
torch.set_num_threads(1)
S = int(sys.argv[1])

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

def step(S, dtype, **arguments):
    q, k, v = (torch.randn(1, 4, S, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    do = torch.ones(1, 4, S, 64, dtype=dtype)
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts here
    before = status("VmRSS")
    torch.autograd.grad(lorasp.dropkey_attention(q, k, v, **arguments), (q, k, v), do)
    return status("VmHWM") - before

CASES = [
    (torch.float32, dict(dropout_p=0.1)),
    (torch.bfloat16, dict(dropout_p=0.1, is_causal=True)),
    (torch.bfloat16, dict(dropout_p=0.1, pattern="element", attn_mask=torch.ones(1, 1, 1, S, dtype=torch.bool))),
]
dtype, arguments = CASES[int(sys.argv[2])]
step(1, dtype, **arguments | {"attn_mask": None})
print(step(S, dtype, **arguments))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("case", range(3), ids=["fp32 column", "bf16 column causal", "bf16 element padding"])
def test_peak_memory_grows_linearly_with_the_sequence(case):
    """One Sq x Sk tensor would grow by 16 from 1k to 4k tokens, and at 4k be 32 MiB for one head in bf16."""

    def peak_kib(S):
        arguments = [sys.executable, "-c", PEAK, str(S), str(case)]
        # Freed memory goes back at once: none of it is used again unseen.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        return int(subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout)

    peaks = [peak_kib(S) for S in (1024, 2048, 4096)]
    assert peaks[0] < peaks[1] < 2.5 * peaks[0]
    assert peaks[1] < peaks[2] < 2.5 * peaks[1]
    assert peaks[2] < 32 * 1024


def test_raw_ops_name_what_does_not_fit():
    q = torch.zeros(1, 2, 4, 8)
    fwd = torch.ops.lorasp.dropkey_attention_fwd_cpp
    with pytest.raises(ValueError, match=r"seed must be a 0-d int64 tensor when dropout_p > 0, got None"):
        fwd(q, q, q, None, None, 0.5, "column", False, 1.0)
    with pytest.raises(ValueError, match="pattern must be column, element or span, got row"):
        fwd(q, q, q, None, None, 0.0, "row", False, 1.0)
    with pytest.raises(TypeError, match="q must be float32, bfloat16 or float16 for backend cpp, got Double"):
        fwd(q.double(), q, q, None, None, 0.0, "column", False, 1.0)

"""lora_linear in C++: every instruction set this machine runs, every plan, against the reference by the rule."""

import itertools
from dataclasses import replace

import pytest
import torch
from keep_bits import keep_at

import lorasp
from lorasp import rng, testing
from lorasp.functional import lora_linear, pack_weight
from lorasp.testing import Case, check_case, make_inputs

_C = pytest.importorskip("lorasp._C", reason="the C++ extension is not built: the reference is in charge")

ISAS = _C.available_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=ISAS)
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


def plans(dtype):
    return [plan for plan in ("addmm", "fused") if testing.lora_linear.plan_obstacle("cpp", plan, dtype) is None]


def assert_meets_the_rule(case):
    for plan in plans(case.dtype):
        wrong = [result for result in check_case(case, "cpp", plan) if not result.ok]
        assert not wrong, wrong


@pytest.mark.parametrize("R", [1, 3, 8, 16, 24, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks(isa, dtype, R):
    assert_meets_the_rule(Case(129, 63, 65, R, dtype, dropout_p=0.1, masters=dtype != torch.float32))


SIZES = [1, 2, 63, 129]
# Of one or two outputs, the rule asks for as few roundings as PyTorch happened to need: a fixed draw that is typical.
SEED = 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 63, 130])
def test_sizes(isa, dtype, M):
    for number, (K, N) in enumerate(itertools.product(SIZES, SIZES)):
        p = (0.0, 0.1, 0.5)[number % 3]
        assert_meets_the_rule(Case(M, K, N, (8, 3)[number % 2], dtype, bias=number % 2 == 0, dropout_p=p, seed=SEED))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), [(1000, 129, 63), (63, 1000, 129), (129, 63, 1000), (160, 4200, 40)])
def test_large_odd_sizes(isa, dtype, M, K, N):
    """Several row blocks, several chunks of columns, several segments of the depth."""
    assert_meets_the_rule(Case(M, K, N, 16, dtype, dropout_p=0.1))


SWITCHES = {
    "freeze_A": {"freeze_A": True},
    "no dx": {"need_dx": False},
    "freeze_A, no dx": {"freeze_A": True, "need_dx": False},
    "masks": {"masks": True},
    "masters": {"masters": True},
    "masters, masks": {"masters": True, "masks": True},
    "zero weight": {"zero_weight": True, "bias": False},
}


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_what_is_asked_for(isa, poisoned, dtype, p, switches):
    assert_meets_the_rule(replace(Case(130, 96, 67, 5, dtype, dropout_p=p), **switches))


def run(case, threads=None, **arguments):
    inputs = make_inputs(case.M, case.K, case.N, case.R, case.dtype, bias=case.bias, masks=case.masks)
    with lorasp.use_backend("cpp"):
        return testing.lora_linear.run(inputs, case, lambda **rest: lora_linear(**rest, **arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [1, 7, 130, 700])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_packed_weight_changes_no_bit(isa, dtype, M, p):
    if "fused" not in plans(dtype):
        pytest.skip(f"no packed layout for {dtype} on {isa}")
    case = Case(M, 100, 130, 8, dtype, dropout_p=p)
    weight = make_inputs(M, 100, 130, 8, dtype)["weight"]
    plain, packed = run(case, plan="fused"), run(case, plan="fused", packed=pack_weight(weight))
    assert all(torch.equal(plain[name], packed[name]) for name in plain)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(isa, dtype, transposed):
    """Row-strided x, dy and weight are read where they lie; a transposed weight (Conv1D) too."""
    case = Case(70, 96, 65, 8, dtype, dropout_p=0.1)
    inputs = make_inputs(70, 96, 65, 8, dtype)

    def strided(tensor):
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 5), float("nan"), dtype=tensor.dtype)
        wide[:, : tensor.shape[1]] = tensor
        return wide[:, : tensor.shape[1]]

    views = dict(inputs, x=strided(inputs["x"]), dy=strided(inputs["dy"]), weight=strided(inputs["weight"]))
    if transposed:
        views["weight"] = inputs["weight"].t().contiguous().t()
    for plan in plans(dtype):
        with lorasp.use_backend("cpp", plan):
            expected, actual = testing.lora_linear.run(inputs, case), testing.lora_linear.run(views, case)
        for name in expected:
            testing.assert_close(actual[name], expected[name], expected[name].double(), dtype, f"{plan} {name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(isa, dtype):
    assert_meets_the_rule(Case(0, 33, 17, 4, dtype, dropout_p=0.1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_nan_and_inf_do_not_leak(isa, dtype):
    keep = rng.keep_mask(1, (70, 96), 0.5, rng.PURPOSE_LORA_DROPOUT)
    inputs = make_inputs(70, 96, 40, 4, dtype, zero_weight=True)
    inputs["x"] = torch.where(keep, inputs["x"], torch.nan)
    for plan in plans(dtype):
        with lorasp.use_backend("cpp", plan):
            op = torch.ops.lorasp.lora_linear_fwd_cpp
            _, xa = op(*(inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")), torch.tensor(1), 1.0,
                       0.5, 0, plan, None)  # fmt: skip
        assert xa.isfinite().all()
        grads = torch.ops.lorasp.lora_linear_bwd_cpp(
            inputs["dy"], inputs["x"], inputs["weight"], inputs["lora_A"], inputs["lora_B"], xa, torch.tensor(1), None,
            None, 1.0, 0.5, 0, True, True, True, plan, None,
        )  # fmt: skip
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_bitwise_repeatable_at_any_thread_count(isa, threads, dtype, count):
    threads(count)
    for M in (9, 200):
        for plan in plans(dtype):
            case = Case(M, 129, 130, 16, dtype, dropout_p=0.1)
            assert all(result.ok for result in check_case(case, "cpp", plan))
            first, second = run(case, plan=plan), run(case, plan=plan)
            assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("start", [0, 1, 7, 8, 63, 2**34 - 13, 2**35 + 5, 2**45 - 1])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_are_the_reference_s_bits(isa, start, p):
    """Any alignment, and counters that carry into their high word (8 * 2^32 elements)."""
    count, seed, purpose, member = 200, -987654321987, 2, 5
    expected = keep_at(start + torch.arange(count), seed, p, purpose, member)
    assert list(_C.keep_mask(seed, start, count, rng.threshold(p), purpose, member)) == expected.int().tolist()


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(RuntimeError, match="avx1024"):
        _C.set_isa("avx1024")


def test_a_packed_weight_of_another_weight_is_refused():
    if "fused" not in plans(torch.float32):
        pytest.skip("no packed layout on this CPU")
    case = Case(9, 64, 48, 4)
    other = pack_weight(torch.zeros(48, 65))
    with pytest.raises(ValueError, match="packed must be"):
        run(case, plan="fused", packed=other)


def test_pack_weight_names_what_it_lacks():
    with pytest.raises(ValueError, match=r"pack_weight: .*Half"):
        pack_weight(torch.zeros(4, 4, dtype=torch.float16))

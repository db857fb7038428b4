"""consistency in C++: every instruction set this machine runs against the reference by the rule."""

from dataclasses import replace

import pytest
import torch

import lorasp
from lorasp import testing
from lorasp.testing.consistency import Case, check_case, make_inputs

_C = pytest.importorskip("lorasp._C", reason="the C++ extension is not built: the reference is in charge")

# Few rows: the rule then asks for as few roundings as PyTorch happened to need. A fixed draw that is typical.
SEED = 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=_C.available_isas())
def isa(request):
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 3, 17, 64, 2047, 2049, 5001])
def test_sizes(isa, dtype, V):
    """Rows of less than a vector, of whole vectors, of several pieces with a rest."""
    for case in testing.consistency.cases([(16, V)], [dtype]):
        for result in check_case(replace(case, seed=SEED), "cpp"):
            assert result.ok, result


@pytest.mark.parametrize("order", ["rising", "falling", "late"])
def test_the_maximum_may_come_late(isa, order):
    """The running sums follow the maximum from piece to piece, past pieces that hold nothing."""
    logits = torch.linspace(-40, 40, 9000).expand(2, 9000).clone()
    logits = logits.flip(1) if order == "falling" else logits
    if order == "late":
        logits[:, :6000] = -torch.inf
    other = logits + torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    inputs = {"logits": logits, "other": other, "mask": None, "drows": torch.ones(2)}
    inputs64 = testing.consistency.in_float64(inputs)
    case = Case(2, 9000)
    with lorasp.use_backend("reference"):
        reference64, reference = (testing.consistency.run(i, case) for i in (inputs64, inputs))
    with lorasp.use_backend("cpp"):
        actual = testing.consistency.run(inputs, case)
    for name in actual:
        testing.assert_close(actual[name], reference[name], reference64[name], torch.float32, name)


def test_same_bits_at_any_thread_count(isa, poisoned_memory):
    case = Case(33, 3001, torch.bfloat16, masks=True)
    inputs, before = make_inputs(case), torch.get_num_threads()
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with lorasp.use_backend("cpp"):
            outputs.append(testing.consistency.run(inputs, case))
    torch.set_num_threads(before)
    assert all(torch.equal(outputs[0][name], other[name]) for other in outputs[1:] for name in other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tv"}, "kind must be one of kl, js, got tv"),
        ({"logits": torch.zeros(2, 3)}, r"logits must be \(B, T, V\), got \[2, 3\]"),
        ({"other": torch.zeros(1, 3, 2)}, r"other must be \[1, 2, 3\], got \[1, 3, 2\]"),
        ({"other": torch.zeros(1, 2, 3).half()}, "other must be Float, got Half"),
        ({"mask": torch.zeros(1, 2)}, "mask must be Bool, got Float"),
        ({"logits": torch.zeros(1, 2, 3).double(), "other": torch.zeros(1, 2, 3).double()}, "logits must be float32"),
    ],
)
def test_raw_op_refuses(change, message):
    arguments = {"logits": torch.zeros(1, 2, 3), "other": torch.zeros(1, 2, 3), "mask": None, "kind": "kl"}
    with pytest.raises((ValueError, TypeError), match=f"consistency: {message}"):
        torch.ops.lorasp.consistency_fwd_cpp(*(arguments | change).values())


def test_rows_to_be_replaced_must_have_unit_stride():
    logits = torch.zeros(1, 3, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="unit stride"):
        torch.ops.lorasp.consistency_replace_cpp(
            torch.ones(1, 2), logits, logits, torch.ones(1, 2, 6), None, "kl", True, True
        )

"""hidden_cut in C++: every instruction set this machine runs against the reference, to the bit where it can be."""

import pytest
import torch

import lorasp
from lorasp import hidden_cut
from lorasp.testing.hidden_cut import Case, check_case, make_inputs, run

_C = pytest.importorskip("lorasp._C", reason="the C++ extension is not built: the reference is in charge")

PATTERNS = ("element", "column", "span")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=_C.available_isas())
def isa(request):
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [None, *DTYPES])
def test_sizes(isa, dtype, residual):
    for shape in ((1, 1, 1), (2, 3, 5), (3, 9, 31), (1, 65, 64), (2, 2, 2049), (1, 3, 5000)):
        for pattern in PATTERNS:
            for result in check_case(Case(*shape, dtype, pattern, 0.3, residual), "cpp"):
                assert result.ok, result


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(1, 7, 3), (3, 50, 130), (2, 3, 4097)])
def test_masks_are_the_reference_s_bits(isa, shape, pattern, p):
    ones = torch.ones(shape)
    with lorasp.use_backend("cpp"):
        y = hidden_cut(ones, p, pattern=pattern, seed=-(2**40) - 17)
        strided = hidden_cut(torch.cat([ones, ones], 2)[..., : shape[2]], p, pattern=pattern, seed=-(2**40) - 17)
    with lorasp.use_backend("reference"):
        assert torch.equal(y, hidden_cut(ones, p, pattern=pattern, seed=-(2**40) - 17))
    assert torch.equal(y, strided)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_bits_at_any_thread_count(isa, pattern, poisoned_memory):
    case = Case(2, 100, 900, torch.bfloat16, pattern, 0.1, torch.bfloat16)
    inputs, before = make_inputs(case), torch.get_num_threads()
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with lorasp.use_backend("cpp"):
            outputs.append(run(inputs, case))
    torch.set_num_threads(before)
    assert all(torch.equal(outputs[0][name], other[name]) for other in outputs[1:] for name in other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "row"}, "pattern must be one of element, column, span, got row"),
        ({"p": 1.0}, r"p must be in \[0, 1\), got 1"),
        ({"x": torch.zeros(2, 3)}, r"x must be \(B, S, F\), got \[2, 3\]"),
        ({"residual": torch.zeros(1, 3, 2)}, r"residual must be \[1, 2, 3\], got \[1, 3, 2\]"),
        ({"x": torch.zeros(1, 2, 3, dtype=torch.float64)}, "x must be float32, bfloat16 or float16"),
    ],
)
def test_raw_op_refuses(change, message):
    arguments = {"x": torch.zeros(1, 2, 3), "residual": None, "seed": torch.tensor(1), "p": 0.5, "pattern": "element"}
    with pytest.raises((ValueError, TypeError), match=f"hidden_cut: {message}"):
        torch.ops.lorasp.hidden_cut_fwd_cpp(*(arguments | change).values())

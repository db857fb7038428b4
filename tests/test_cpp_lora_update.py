"""lora_update in C++: every instruction set this machine runs, against the reference by the rule.

Its passes are those of lora_linear's plan addmm, which test_cpp_lora_linear.py tries on more sizes.
"""

import pytest
import torch
from torch.nn.functional import linear

import lorasp
from lorasp import testing
from lorasp.testing.lora_update import Case, check_case, make_inputs, run

_C = pytest.importorskip("lorasp._C", reason="the C++ extension is not built: the reference is in charge")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=_C.available_isas(), autouse=True)
def isa(request):
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


@pytest.fixture
def poisoned(poisoned_memory):
    """The kernels' own memory is NaN before each use, too."""
    _C.poison_scratch(True)
    yield
    _C.poison_scratch(False)


SWITCHES = (
    {},
    {"freeze_A": True, "dropout_p": 0.5},
    {"freeze_B": True, "dropout_p": 0.1},
    {"freeze_A": True, "need_dx": False},
    {"freeze_B": True, "need_dx": False, "dropout_p": 0.1},
    {"freeze_A": True, "freeze_B": True},
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_and_what_is_asked_for(poisoned, dtype):
    shapes = [(1, 1, 2, 1), (9, 300, 65, 3), (130, 63, 129, 8), (65, 40, 700, 24), (0, 7, 5, 2), (700, 20, 33, 64)]
    for number, shape in enumerate(shapes):
        for switches in SWITCHES:
            masters = dtype != torch.float32 and number % 2 == 0
            for result in check_case(Case(*shape, dtype, masters=masters, **switches, seed=3), "cpp"):
                assert result.ok, result


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_repeatable_at_any_thread_count(poisoned, dtype, count):
    case, before = Case(300, 520, 260, 16, dtype, dropout_p=0.1), torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        for result in check_case(case, "cpp"):
            assert result.ok, result
        inputs = make_inputs(case)
        with lorasp.use_backend("cpp"):
            once, again = run(inputs, case), run(inputs, case)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 200])
def test_it_is_the_update_of_plan_addmm_to_the_bit(dtype, M):
    inputs = testing.make_inputs(M, 100, 130, 8, dtype)
    x, A, B = leaves = [inputs[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
    options = {"scale": 0.5, "dropout_p": 0.1, "seed": 7}
    with lorasp.use_backend("cpp"):
        whole = lorasp.lora_linear(x, inputs["weight"], A, B, inputs["bias"], **options, plan="addmm")
        apart = lorasp.lora_update(linear(x, inputs["weight"], inputs["bias"]), x, A, B, **options)
        assert torch.equal(whole, apart)
        want = torch.autograd.grad(whole, leaves, inputs["dy"])
        dx = inputs["dy"] @ inputs["weight"]
        xa = torch.ops.lorasp.lora_update_fwd_cpp(torch.zeros_like(apart), x, A, B, torch.tensor(7), 0.5, 0.1, 0)
        gradients = torch.ops.lorasp.lora_update_bwd_cpp(
            dx, inputs["dy"], x, A, B, xa, torch.tensor(7), 0.5, 0.1, 0, True, True
        )
    for have, expected in zip((dx, *gradients), want, strict=True):
        assert torch.equal(have, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_strided_tensors_are_updated_where_they_lie(transposed):
    case = Case(70, 96, 65, 8, torch.bfloat16, dropout_p=0.1)
    inputs = testing.lora_update.make_inputs(case)

    def strided(tensor):
        if transposed:
            return tensor.t().contiguous().t()
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 5), float("nan"), dtype=tensor.dtype)
        wide[:, : tensor.shape[1]] = tensor
        return wide[:, : tensor.shape[1]]

    views = {name: strided(inputs[name]) for name in ("y", "x", "dy")} | {"dx": strided(torch.ones(70, 96).bfloat16())}
    seed = torch.tensor(1)
    results = []
    for y, x, dy, dx in (
        (inputs["y"], inputs["x"], inputs["dy"], torch.ones(70, 96).bfloat16()),
        (views["y"], views["x"], views["dy"], views["dx"]),
    ):
        factors = inputs["lora_A"], inputs["lora_B"]
        xa = torch.ops.lorasp.lora_update_fwd_cpp(y, x, *factors, seed, 1.0, 0.1, 0)
        gradients = torch.ops.lorasp.lora_update_bwd_cpp(dx, dy, x, *factors, xa, seed, 1.0, 0.1, 0, True, True)
        results.append((y, xa, dx, *gradients))
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)


def test_overlapping_memory_is_refused():
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        torch.ops.lorasp.lora_update_fwd_cpp(
            torch.zeros(4).expand(3, 4), torch.ones(3, 5), torch.ones(2, 5), torch.ones(4, 2), None, 1.0, 0.0, 0
        )

"""lora_linear_group in C++: every instruction set, plan and selection, against the reference by the rule."""

import itertools
from dataclasses import replace

import pytest
import torch

import lorasp
from lorasp import rng, testing
from lorasp.functional import pack_weight
from lorasp.ops.lora_linear_group import backward_ops, forward_ops
from lorasp.testing.lora_linear_group import GRANULARITIES, Case, check_case, make_inputs, run, to_double

_C = pytest.importorskip("lorasp._C", reason="the C++ extension is not built: the reference is in charge")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=_C.available_isas())
def isa(request):
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


@pytest.fixture
def poisoned():
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


def assert_meets_the_rule(*cases):
    for case in cases:
        for plan in plans(case.dtype):
            wrong = [result for result in check_case(case, "cpp", plan) if not result.ok]
            assert not wrong, wrong


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_part(isa, poisoned, dtype, granularity):
    """Members of different N, R and scale; single features (K below 512) and blocks of 64 with a ragged last one."""
    plain = Case(67, 70, 33, 5, dtype, granularity=granularity)
    assert_meets_the_rule(
        replace(plain, members=3),
        replace(plain, members=3, dropout_p=0.3, frozen_B=True),
        replace(plain, members=2, freeze_A=True, bias=False),
        replace(plain, members=2, need_dx=False, masters=dtype != torch.float32, dropout_p=0.1),
        replace(plain, members=2, K=650, dropout_p=0.1, keep_input=True),
        replace(plain, masters=dtype != torch.float32, frozen_low=True, frozen_B=True),
        replace(plain, masks=granularity is None),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(isa, dtype):
    for number, (M, K) in enumerate(itertools.product([0, 1, 63, 130], [1, 65, 520])):
        p = (0.0, 0.1)[number % 2]
        # Of one or two outputs, the rule asks for as few roundings as PyTorch happened to need: typical draws.
        assert_meets_the_rule(Case(M, K, 17, 4, dtype, 1 + number % 3, "feature", dropout_p=p, seed=3))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_wide_and_tall(isa, p):
    """Several chunks of columns, selected ones too, several row blocks, ranks above a tile."""
    assert_meets_the_rule(
        Case(40, 4300, 24, 8, torch.bfloat16, 2, "feature", dropout_p=p),
        Case(600, 130, 70, 17, torch.bfloat16, 2, "feature", dropout_p=p),
    )


def columns_that_are(kind, K):
    if kind == "scattered":
        return torch.randperm(K, generator=torch.Generator().manual_seed(1))[: K // 3].sort().values
    return torch.tensor({"one": [K - 1], "all": list(range(K)), "a run across words": list(range(60, 200))}[kind])


@pytest.mark.parametrize("kind", ["scattered", "one", "all", "a run across words"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_columns_of_a_strided_input(isa, dtype, kind):
    """x[:, J] to the bit, from rows that lie apart, whichever plan gathers it."""
    K, nothing = 600, [None]
    wide = torch.randn(130, K + 7).to(dtype)
    x, columns = wide[:, :K], columns_that_are(kind, K)
    weight, lora_A, lora_B = (torch.randn(shape).to(dtype) for shape in ((9, K), (4, K), (9, 4)))
    for plan in plans(dtype):
        *_, gathered = forward_ops["cpp"](
            x, [weight], nothing, [lora_A], [lora_B], nothing, nothing, columns, nothing, nothing, nothing, None, [1.0],
            0.0, [0], True, plan, nothing,
        )  # fmt: skip
        assert torch.equal(gathered, x[:, columns])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_gradients_and_transposed_weights(isa, dtype):
    case = Case(70, 90, 65, 8, dtype, members=2, granularity="feature", dropout_p=0.1)
    inputs = make_inputs(case)

    def strided(tensor):
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 5), float("nan"), dtype=tensor.dtype)
        wide[:, : tensor.shape[1]] = tensor
        return wide[:, : tensor.shape[1]]

    views = inputs | {
        "x": strided(inputs["x"]),
        "dys": [strided(dy) for dy in inputs["dys"]],
        "weights": [strided(inputs["weights"][0]), inputs["weights"][1].t().contiguous().t()],
    }
    with lorasp.use_backend("reference"):
        reference64, reference = run(to_double(inputs), case), run(inputs, case)
    for plan in plans(dtype):
        with lorasp.use_backend("cpp", plan):
            actual = run(views, case)
        for name, value in reference.items():
            testing.assert_close(actual[name], value, reference64[name], dtype, f"{plan} {name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_nan_does_not_leak(isa, dtype):
    """NaN where all members drop x: nothing of the adapters sees it, x[:, J] included."""
    keeps = [rng.keep_mask(1, (70, 96), 0.5, rng.PURPOSE_LORA_DROPOUT, member) for member in range(2)]
    case = Case(70, 96, 40, 4, dtype, members=2, granularity="feature", dropout_p=0.5)
    inputs = make_inputs(case)
    inputs["x"] = torch.where(keeps[0] | keeps[1], inputs["x"], torch.nan)
    partial, nothing = inputs["partial"], [None, None]
    factors = (
        inputs["lora_As"], inputs["lora_Bs"], partial.frozen_As, partial.frozen_Bs, partial.columns, partial.rows,
        nothing, nothing,
    )  # fmt: skip
    seed = torch.tensor(1)
    for plan in plans(dtype):
        _, xas, x_columns = forward_ops["cpp"](
            inputs["x"], inputs["weights"], nothing, *factors, seed, [1.0, 1.0], 0.5, [0, 1], True, plan, nothing
        )
        # The frozen product passes NaN on; each adapter may see only what its own mask keeps.
        for member, xa in enumerate(xas):
            sees = (inputs["x"].isnan() & keeps[member]).any(1)
            assert torch.equal(xa.isnan().any(1), sees)
        dx, dlora_As, dlora_Bs = backward_ops["cpp"](
            inputs["dys"], None, x_columns, inputs["weights"], *factors, xas, seed, nothing, nothing, [1.0, 1.0], 0.5,
            [0, 1], 96, True, [True, True], [True, True], plan, nothing,
        )  # fmt: skip
        assert all(tensor.isfinite().all() for tensor in (dx, *dlora_As, *dlora_Bs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [7, 300])
def test_packed_weights_change_no_bit(isa, dtype, M):
    if "fused" not in plans(dtype):
        pytest.skip(f"no packed layout for {dtype} on {isa}")
    case = Case(M, 100, 70, 8, dtype, members=3, dropout_p=0.1)
    inputs = make_inputs(case)
    packed = [pack_weight(weight) for weight in inputs["weights"]]
    with lorasp.use_backend("cpp", "fused"):
        plain, some, every = (run(inputs | {"packed": p}, case) for p in (None, [packed[0], None, packed[2]], packed))
    assert all(torch.equal(plain[name], some[name]) and torch.equal(plain[name], every[name]) for name in plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3])
def test_bitwise_repeatable_at_any_thread_count(isa, threads, dtype, count):
    threads(count)
    case = Case(200, 129, 130, 8, dtype, members=2, granularity="feature", dropout_p=0.1)
    inputs = make_inputs(case)
    for plan in plans(dtype):
        with lorasp.use_backend("cpp", plan):
            first, second = run(inputs, case), run(inputs, case)
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_member_alone_is_the_same_function(dtype, p):
    """Groups change where sums are cut, not what is summed: each member's gradients equal its own single call's."""
    case = Case(130, 640, 65, 8, dtype, members=3, granularity="feature", dropout_p=p)
    inputs = make_inputs(case)
    with lorasp.use_backend("reference"):
        reference64, reference = run(to_double(inputs), case), run(inputs, case)
    for i in range(3):
        fields = (None if field is None or name == "columns" else [field[i]]
                  for name, field in inputs["partial"]._asdict().items())  # fmt: skip
        partial = type(inputs["partial"])(*fields)._replace(columns=inputs["partial"].columns)
        alone = {
            name: value if name == "x" else [value[i]] for name, value in inputs.items() if isinstance(value, list)
        } | {"x": inputs["x"], "partial": partial, "members": [i]}
        with lorasp.use_backend("cpp"):
            actual = run(alone, case)
        for name in ("y", "dlora_A", "dlora_B"):
            testing.assert_close(actual[f"{name}0"], reference[f"{name}{i}"], reference64[f"{name}{i}"], dtype, name)


def allocated(function):
    """Bytes that torch's allocator hands out during one call, freed again or not."""
    function()
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("plan", ["addmm", "fused"])
def test_nothing_of_x_s_size_is_made_on_the_way(plan, one_thread):
    """Outputs, what has the adapters' size and the library's own: no copy of x, no second dx, no masked x.

    With more threads the library pads odd outputs in a copy of its own.
    """
    if plan not in plans(torch.bfloat16):
        pytest.skip(f"no plan {plan} for bfloat16 on this CPU")
    M, K, N, R, G = 2048, 512, 192, 8, 3
    case = Case(M, K, N, R, torch.bfloat16, members=G, granularity="feature", dropout_p=0.1, bias=False)
    inputs = make_inputs(case)
    partial, nothing = inputs["partial"], [None] * G
    factors = (
        inputs["lora_As"], inputs["lora_Bs"], partial.frozen_As, partial.frozen_Bs, partial.columns, partial.rows,
        nothing, nothing,
    )  # fmt: skip
    seed, scales, members, J = torch.tensor(1), [1.0] * G, list(range(G)), partial.columns.numel()
    ranks = sum(R + i for i in range(G))
    forward = lambda: forward_ops["cpp"](  # noqa: E731
        inputs["x"], inputs["weights"], nothing, *factors, seed, scales, 0.1, members, True, plan, nothing
    )
    outputs = M * sum(N + 5 * i for i in range(G)) + M * J + M * ranks
    assert 2 * outputs <= allocated(forward) < 2 * (outputs + M * K // 2)
    _, xas, x_columns = forward()
    backward = lambda: backward_ops["cpp"](  # noqa: E731
        inputs["dys"], None, x_columns, inputs["weights"], *factors, xas, seed, nothing, nothing, scales, 0.1, members,
        K, True, [True] * G, [True] * G, plan, nothing,
    )  # fmt: skip
    assert 2 * M * K <= allocated(backward) < 2 * (M * K + M * K // 2)


def raw_forward(**changed):
    nothing = [None]
    arguments = {
        "x": torch.randn(5, 8), "weights": [torch.randn(6, 8)], "biases": nothing, "lora_As": [torch.randn(2, 3)],
        "lora_Bs": [torch.randn(6, 2)], "frozen_As": [torch.randn(2, 8)], "frozen_Bs": nothing,
        "columns": torch.tensor([1, 4, 6]), "rows": nothing, "entries_A": nothing, "entries_B": nothing, "seed": None,
        "scales": [1.0], "dropout_p": 0.0, "members": [0], "keep_columns": True, "plan": "auto", "packed": nothing,
    }  # fmt: skip
    return forward_ops["cpp"](*(arguments | changed).values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"columns": torch.tensor([1, 6, 4])}, "columns must ascend"),
        ({"columns": torch.tensor([1, 4, 4])}, "columns must ascend"),
        ({"columns": torch.tensor([1, 4, 8])}, "columns must ascend"),
        ({"columns": torch.tensor([-1, 4, 6])}, "columns must ascend"),
        ({"rows": [torch.tensor([0, 6])], "lora_Bs": [torch.randn(2, 2)]}, r"rows\[0\] must ascend"),
        ({"entries_B": [torch.tensor([3, 12])], "lora_Bs": [torch.randn(2)]}, r"entries_B\[0\] must ascend"),
        ({"columns": None}, r"frozen_As\[0\] must come with columns"),
        ({"columns": torch.tensor([1, 4])}, r"lora_As\[0\] must be \[2, 2\], got \[2, 3\]"),
        ({"lora_Bs": [torch.randn(5, 2)]}, r"lora_Bs\[0\] must be \[6, 2\]"),
        ({"scales": [1.0, 2.0]}, "one item per weight"),
        ({"plan": "onepass"}, "plan must be auto, addmm or fused"),
        ({"dropout_p": 0.5}, "seed must be"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    with pytest.raises(ValueError, match=f"lora_linear_group: {message}" if "one item" not in message else message):
        raw_forward(**changed)


def test_info_tells_the_rule_that_the_kernels_follow():
    for dtype, M, packed, dropout, trains_A in itertools.product(
        ("float32", "bfloat16", "float16"), (1, 2048), (False, True), (False, True), (False, True)
    ):
        chosen = _C.auto_plans(dtype, M, 64, 64, packed, dropout, trains_A)
        assert set(chosen) <= set(plans(getattr(torch, dtype)))
    with pytest.raises(ValueError, match="float64"):
        _C.auto_plans("float64", 1, 1, 1, False, False, False)

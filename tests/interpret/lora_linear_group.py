"""lora_linear_group's Triton kernels, interpreted on CPU tensors; run by test_triton_lora_linear_group.py."""

from dataclasses import replace

import pytest
import torch

import lorasp
from lorasp import rng
from lorasp.ops import lora_linear_group as ops
from lorasp.testing.lora_linear_group import Case, check_case, make_inputs, run
from lorasp.triton_kernels import launch, tuning
from lorasp.triton_kernels import lora_linear_group as kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PLANS = ("addmm", "fused", "onepass")
HALF = torch.float16
# (M, K, N, R): odd sizes, sizes that suit tensor descriptors, features selected one by one and in blocks of 64.
CASES = (
    (Case(33, 40, 24, 3, members=3), PLANS),
    (Case(1, 65, 33, 8, members=3, dropout_p=0.4, bias=False), ("addmm", "onepass")),
    (Case(33, 96, 64, 15, HALF, members=3), ("addmm", "fused")),
    (Case(40, 64, 32, 16, HALF, members=2, masters=True, dropout_p=0.4), ("addmm", "fused")),
    (Case(17, 33, 9, 1, members=4, dropout_p=0.4, masks=True), ("addmm", "fused")),
    (Case(17, 33, 9, 40, members=2, masks=True), ("fused",)),
    (Case(9, 16, 8, 2, members=7), ("addmm", "fused")),
    (Case(33, 65, 24, 3, members=3, granularity="feature"), PLANS),
    (Case(33, 64, 24, 3, HALF, members=2, granularity="feature", dropout_p=0.4, frozen_B=True), PLANS),
    (Case(9, 640, 8, 3, members=2, granularity="feature", dropout_p=0.4), ("fused",)),
    (Case(9, 519, 9, 3, members=1, granularity="feature", dropout_p=0.4, need_dx=False), ("fused",)),
    (Case(63, 64, 40, 17, HALF, granularity="feature", masters=True, frozen_low=True), ("addmm", "fused")),
    (Case(33, 40, 24, 3, members=4, granularity="feature-whole", dropout_p=0.4), ("addmm",)),
    (Case(33, 40, 24, 3, granularity="feature-whole", need_dx=False), ("onepass",)),
    (Case(33, 40, 24, 3, granularity="feature", freeze_A=True, frozen_B=True, dropout_p=0.4), PLANS),
    (Case(33, 40, 24, 3, HALF, members=2, granularity="element"), ("addmm", "fused")),
    (Case(33, 40, 24, 3, members=2, granularity="element", frozen_B=True, dropout_p=0.4), ("fused",)),
    (Case(33, 40, 24, 3, granularity="element", freeze_A=True, need_dx=False), ("addmm",)),
)


@pytest.mark.parametrize(
    ("case", "plan"), [(case, plan) for case, plans in CASES for plan in plans], ids=lambda value: str(value)
)
def test_outputs_and_gradients(case, plan):
    for result in check_case(case, "triton", plan):
        assert result.ok, result


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that run, in order."""
    names = []

    def spy(kernel, *arguments, **options):
        names.append(kernel.fn.__name__.removeprefix("_lora_linear_").removesuffix("_kernel"))
        launch.run(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "_interceptor", spy)
    return names


def calls_of(case, plan="fused", inputs=None):
    """The raw forward's and backward's arguments and results in one run of the case."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        for table, name in ((ops.forward_ops, "forward"), (ops.backward_ops, "backward")):

            def record(*arguments, raw=table["triton"], name=name):
                seen[name] = arguments, raw(*arguments)
                return seen[name][1]

            patch.setitem(table, "triton", record)
        with lorasp.use_backend("triton", plan):
            seen["outputs"] = run(inputs or make_inputs(case), case)
    return seen


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_x_is_read_once_and_dx_written_once(p, launched):
    """Three members that train on half of the features: one projection with the gather in it, one product for dx."""
    calls_of(Case(33, 40, 24, 3, members=3, granularity="feature", dropout_p=p))
    assert launched.count("group_project") == launched.count("group_gemm") == 1
    assert launched.count("project_outer") == 3  # g and dB, whose dy are the members' own
    assert launched.count("columns_outer") == (3 if p else 0)
    assert launched.count("outer") == (0 if p else 1)  # every dA
    assert launched.count("group_accumulate") == (1 if p else 0)


@pytest.mark.parametrize(("dtype", "N", "p", "kernel"), [
    (HALF, 24, 0.0, "group_gemm_tma"), (HALF, 24, 0.4, "group_gemm_tma"), (torch.float32, 24, 0.0, "group_gemm"),
])  # fmt: skip
def test_tensor_descriptors_serve_aligned_half_precision(dtype, N, p, kernel, launched):
    inputs = make_inputs(Case(33, 40, N, 3, dtype))
    group = {name: value * 2 for name, value in inputs.items() if isinstance(value, list)}
    calls_of(Case(33, 40, N, 3, dtype, members=2, dropout_p=p), inputs=inputs | group)
    assert [name for name in launched if name.startswith("group_gemm")] == [kernel]


def test_gathered_columns_are_copies():
    for K in (33, 520):
        case = Case(5, K, 8, 3, members=4, granularity="feature", need_dx=False)
        for plan in PLANS[1:]:
            inputs = make_inputs(case)
            _, (_, _, x_columns) = calls_of(case, plan, inputs)["forward"]
            assert torch.equal(x_columns, inputs["x"][:, inputs["partial"].columns])


def test_members_draw_their_own_masks():
    """The counter's word is members[i], all 32 bits of it."""
    case = Case(33, 40, 24, 3, members=3, dropout_p=0.5)
    inputs, members, seed = make_inputs(case), [2, 0, 2**32 - 1], torch.tensor(7)
    x, nothing = inputs["x"], [None] * 3
    _, xas, _ = kernels.forward(
        x, inputs["weights"], nothing, inputs["lora_As"], inputs["lora_Bs"], nothing, nothing, None, nothing, nothing,
        nothing, seed, inputs["scales"], 0.5, members, False, "addmm",
    )  # fmt: skip
    for member, A, scale, xa in zip(members, inputs["lora_As"], inputs["scales"], xas, strict=True):
        keep = rng.keep_mask(seed, tuple(x.shape), 0.5, rng.PURPOSE_LORA_DROPOUT, member)
        torch.testing.assert_close(xa, torch.where(keep, x, 0) @ A.t() * (2 * scale))


@pytest.mark.parametrize(("plan", "case"), [
    ("fused", Case(33, 40, 24, 3, HALF, members=2, granularity="feature", dropout_p=0.4)),
    ("addmm", Case(33, 64, 32, 8, members=2)),
], ids=str)  # fmt: skip
def test_repeatable_to_the_bit(plan, case):
    first, second = calls_of(case, plan)["outputs"], calls_of(case, plan)["outputs"]
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(("parts", "one_pass"), [(1, False), (3, True), (3, False)])
def test_split_sums(parts, one_pass, launched, monkeypatch):
    monkeypatch.setattr(tuning, "split", lambda *_: parts)
    monkeypatch.setattr(tuning, "one_pass_over_dy", lambda *_: one_pass)
    for granularity, p in (("feature", 0.4), ("feature-whole", 0.0)):
        for result in check_case(
            Case(40, 70, 27, 3, members=2, granularity=granularity, dropout_p=p), "triton", "fused"
        ):
            assert result.ok, result
    assert ("project_outer" in launched) == one_pass


@pytest.mark.parametrize("K", [64, 63])
def test_nothing_leaks_from_dropped_inputs(K):
    case = Case(32, K, 8, 3, members=2, granularity="feature", dropout_p=0.5)
    inputs = make_inputs(case)
    clean = calls_of(case, "fused", inputs)
    for i in range(2):
        dropped = ~rng.keep_mask(case.seed + 1, (32, K), 0.5, rng.PURPOSE_LORA_DROPOUT, i)
        dirty = calls_of(case, "fused", inputs | {"x": inputs["x"].masked_fill(dropped, float("nan"))})
        assert torch.equal(clean["forward"][1][1][i], dirty["forward"][1][1][i])
        for name in (f"dlora_A{i}", f"dlora_B{i}", "dx"):
            assert torch.equal(clean["outputs"][name], dirty["outputs"][name]), name


def test_frozen_entries_stay_zero_even_from_nan():
    case = Case(40, 33, 24, 3, members=2, granularity="feature-whole")
    inputs = make_inputs(case)
    inputs["dys"] = [dy.index_fill(0, torch.tensor([0]), float("nan")) for dy in inputs["dys"]]
    out = calls_of(case, "fused", inputs)["outputs"]
    frozen = torch.ones(33, dtype=torch.bool).index_fill(0, inputs["partial"].columns, False)
    for i, rows in enumerate(inputs["partial"].rows):
        assert out[f"dlora_A{i}"][:, frozen].count_nonzero() == 0
        assert out[f"dlora_A{i}"][:, ~frozen].isnan().all()
        assert out[f"dlora_B{i}"].index_fill(0, rows, 0).count_nonzero() == 0
        assert out[f"dlora_B{i}"][rows].isnan().all()


@pytest.mark.parametrize("plan", PLANS)
def test_any_strides(plan):
    """Weights of different layouts in one group, x and dy with gaps, factors column after column."""
    case = Case(33, 40, 24, 3, members=3, granularity="feature")
    inputs = make_inputs(case)

    def spread(tensor):
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 3), float("nan"))
        wide[:, : tensor.shape[1]] = tensor
        return wide[:, : tensor.shape[1]]

    laid = inputs | {
        "x": inputs["x"].t().contiguous().t(),
        "weights": [inputs["weights"][0], inputs["weights"][1].t().contiguous().t(), spread(inputs["weights"][2])],
        "dys": [spread(inputs["dys"][0]), inputs["dys"][1].t().contiguous().t(), inputs["dys"][2]],
        "lora_As": [a.t().contiguous().t() for a in inputs["lora_As"]],
    }
    want, got = calls_of(case, plan, inputs)["outputs"], calls_of(case, plan, laid)["outputs"]
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_no_rows():
    case = Case(0, 40, 24, 3, members=2, granularity="feature", dropout_p=0.4)
    seen = calls_of(case)
    assert seen["forward"][1][2].shape == (0, 20)
    for name, tensor in seen["outputs"].items():
        assert tensor.count_nonzero() == 0
        assert (0 in tensor.shape) == (not name.startswith("dlora"))


def test_only_what_is_needed(launched):
    (*arguments, needs_dx, needs_A, needs_B, plan, _packed), full = calls_of(Case(33, 40, 24, 3, members=3))["backward"]
    assert (needs_dx, needs_A, needs_B) == (True, [True] * 3, [True] * 3)
    for need in ((False, [False, True, False], [True, False, False]), (True, [False] * 3, [False] * 3)):
        launched.clear()
        dx, dAs, dBs = kernels.backward(*arguments, *need, plan)
        for wanted, got, whole in zip(
            (need[0], *need[1], *need[2]), (dx, *dAs, *dBs), (full[0], *full[1], *full[2]), strict=True
        ):
            assert torch.allclose(got, whole, atol=1e-5) if wanted else got.shape == (0,)
        assert launched.count("outer") == need[1].count(True) + need[2].count(True)


@pytest.mark.parametrize(
    ("case", "plan", "message"),
    [
        (Case(4, 8, 8, 64, members=2), "onepass", "plan onepass takes R <= 64, got 65"),
        (replace(Case(4, 8, 8, 2), dtype=torch.float64), "auto", "x must be float32, bfloat16 or float16"),
        (
            replace(Case(4, 8, 8, 2), dtype=torch.bfloat16),
            "auto",
            "x must be float32 or float16 under TRITON_INTERPRET",
        ),
    ],
    ids=str,
)
def test_refusals(case, plan, message):
    inputs = make_inputs(case)
    nothing = [None] * case.members
    with pytest.raises(ValueError, match=f"lora_linear_group: {message}"):
        kernels.forward(
            inputs["x"], inputs["weights"], inputs["biases"], inputs["lora_As"], inputs["lora_Bs"], nothing, nothing,
            None, nothing, nothing, nothing, None, inputs["scales"], 0.0, list(range(case.members)), False, plan,
        )  # fmt: skip

"""lora_linear_group, the public function, on the reference backend: one node for several layers, whole or in part."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import lorasp
from lorasp import Partial, lora_linear, lora_linear_group, rng
from lorasp.memory import saved_bytes
from lorasp.ops import lora_linear_group as ops
from lorasp.ops import registry
from lorasp.testing import assert_close
from lorasp.testing.lora_linear_group import GRANULARITIES, Case, cases, make_inputs, run, to_double

CPU_BACKENDS = [
    name for name in ("reference", "cpp", "triton") if registry.unsupported(name, "cpu", torch.float32) is None
]


@pytest.fixture(autouse=True)
def on_reference():
    with lorasp.use_backend("reference"):
        yield


def dense_oracle(inputs, case):
    """Dense LoRA by autograd alone: the effective factors, every gradient masked, zeros where nothing trains."""
    p = inputs["partial"] or Partial()
    x = inputs["x"].clone().requires_grad_(case.need_dx)
    ys, factors = [], []
    for i, weight in enumerate(inputs["weights"]):
        A, B = inputs["lora_As"][i], inputs["lora_Bs"][i]
        train_A = train_B = slice(None)
        if p.frozen_As and p.frozen_As[i] is not None:
            packed, A = A, p.frozen_As[i].clone()
            train_A = (slice(None), p.columns) if p.entries_A is None else torch.unravel_index(p.entries_A[i], A.shape)
            A[train_A] = packed
        elif p.columns is not None:
            train_A = (slice(None), p.columns)
        N, R = weight.shape[0], A.shape[0]
        if B.shape != (N, R):
            frozen = p.frozen_Bs and p.frozen_Bs[i]
            packed, B = B, torch.zeros(N, R, dtype=B.dtype) if frozen is None else frozen.clone()
            train_B = (p.rows[i],) if p.entries_B is None else torch.unravel_index(p.entries_B[i], B.shape)
            B[train_B] = packed
        elif p.rows is not None:
            train_B = (p.rows[i],)
        A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
        keep = rng.keep_mask(case.seed + 1, x.shape, case.dropout_p, rng.PURPOSE_LORA_DROPOUT, i)
        dropped = torch.where(keep, x, 0) * rng.rescale(case.dropout_p)
        ys.append(x @ weight.t() + inputs["scales"][i] * dropped @ A.t() @ B.t())
        if inputs["biases"][i] is not None:
            ys[i] = ys[i] + inputs["biases"][i]
        factors.append((A, B, train_A, train_B))
    leaves = [x] * case.need_dx + [t for A, B, *_ in factors for t in (A, B)]
    gradients = iter(torch.autograd.grad(ys, leaves, inputs["dys"]))
    expected = {f"y{i}": y.detach() for i, y in enumerate(ys)} | ({"dx": next(gradients)} if case.need_dx else {})
    for i, (_, _, train_A, train_B) in enumerate(factors):
        for name, train in (("A", train_A), ("B", train_B)):
            dense = next(gradients)
            whole = dense.shape == inputs[f"lora_{name}s"][i].shape
            masked = torch.zeros_like(dense)
            masked[train] = dense[train]
            expected[f"dlora_{name}{i}"] = masked if whole else dense[train]
    return expected


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("members", [1, 3])
def test_equals_dense_lora_with_masked_gradients(granularity, p, members):
    case = Case(11, 24, 10, 3, torch.float64, members, granularity, frozen_B=granularity != "feature", dropout_p=p)
    inputs = make_inputs(case)
    have, expected = run(inputs, case), dense_oracle(inputs, case)
    assert have.keys() == expected.keys()
    for name, value in expected.items():
        shape = have[name].shape
        torch.testing.assert_close(have[name], value.reshape(shape))


def test_blocks_of_64_columns_and_zero_frozen_rows():
    case = Case(6, 520, 12, 4, torch.float64, 2, "feature")
    inputs = make_inputs(case)
    assert inputs["partial"].columns.shape[0] % 64 in (0, 8)
    expected = dense_oracle(inputs, case)
    for name, have in run(inputs, case).items():
        torch.testing.assert_close(have, expected[name])


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradcheck(granularity, p):
    case = Case(3, 6, 4, 2, torch.float64, 2, granularity, frozen_B=True)
    inputs = make_inputs(case)
    inputs.pop("dys")
    As, Bs = inputs.pop("lora_As"), inputs.pop("lora_Bs")
    if granularity == "feature-whole":  # entries that are told not to train have no gradient to be checked
        partial = inputs["partial"]
        dense = [torch.zeros_like(a) for a in As]
        x = inputs.pop("x").requires_grad_()
        assert gradcheck(lambda x: lora_linear_group(x, lora_As=dense, lora_Bs=Bs, dropout_p=p, seed=5, **inputs), x)
        assert partial.rows
        return
    leaves = [t.requires_grad_() for t in (inputs.pop("x"), *As, *Bs)]

    def function(x, *factors):
        return lora_linear_group(x, lora_As=factors[:2], lora_Bs=factors[2:], dropout_p=p, seed=5, **inputs)

    assert gradcheck(function, leaves)


@settings(max_examples=100)
@given(data=st.data())
def test_any_shapes_strides_and_dtypes(data):
    M, K, N, R = (data.draw(st.integers(low, high)) for low, high in ((0, 70), (1, 150), (1, 80), (1, 20)))
    granularity = data.draw(st.sampled_from(GRANULARITIES))
    switches = {name: data.draw(st.booleans()) for name in ("frozen_B", "bias", "freeze_A", "need_dx", "keep_input")}
    case = Case(
        M, K, N, R, data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        data.draw(st.integers(1, 3)), granularity, dropout_p=data.draw(st.sampled_from([0.0, 0.1, 0.6])), **switches,
    )  # fmt: skip
    inputs = make_inputs(case)
    inputs["x"] = data.draw(st.sampled_from([strided, transposed]))(inputs["x"])
    inputs["dys"] = [data.draw(st.sampled_from([strided, transposed]))(dy) for dy in inputs["dys"]]
    inputs["weights"] = [data.draw(st.sampled_from([strided, transposed]))(weight) for weight in inputs["weights"]]
    exact, plain = run(to_double(inputs), case), run(inputs, case)
    for backend in CPU_BACKENDS:
        if registry.unsupported(backend, "cpu", case.dtype) is None:
            with lorasp.use_backend(backend):
                have = run(inputs, case)
            for name, value in exact.items():
                if value.numel():
                    assert_close(have[name], plain[name], value, case.dtype)
                assert have[name].shape == value.shape


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, 1)[:, ::2]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_separate_layers(dtype):
    """The same seed and member number give the same function, alone or in a group."""
    case = Case(9, 20, 12, 3, dtype, 3, dropout_p=0.25)
    inputs = make_inputs(case)
    together = run(inputs, case)
    inputs64 = to_double(inputs)
    together64 = run(inputs64, case)
    total = 0
    for i in range(3):
        one = {name: [value[i]] for name, value in inputs.items() if isinstance(value, list)} | {"x": inputs["x"]}
        alone = run(one | {"members": [i], "partial": None}, case)
        total = total + alone.pop("dx").double()
        for name, value in alone.items():
            assert torch.equal(value, together[f"{name[:-1]}{i}"]), name
    assert_close(total, together["dx"], together64["dx"], dtype)


def test_one_member_is_lora_linear():
    case = Case(5, 16, 8, 4, dropout_p=0.5)
    inputs = make_inputs(case)
    y = lora_linear(
        inputs["x"], inputs["weights"][0], inputs["lora_As"][0], inputs["lora_Bs"][0], inputs["biases"][0],
        scale=2.0, dropout_p=0.5, seed=1,
    )  # fmt: skip
    assert torch.equal(run(inputs, case)["y0"], y)


M, K, N, R = 32, 640, 24, 4
ELEMENT = 4


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(M, K, N, R, members=3), M * K + M * (R + R + 1 + R + 2)),
        (Case(M, K, N, R, granularity="feature"), M * 320 + M * R),
        (Case(M, K, N, R, members=3, granularity="feature"), M * 320 + M * (R + R + 1 + R + 2)),
        (Case(M, K, N, R, granularity="feature-whole"), M * 320 + M * R),
        (Case(M, K, N, R, granularity="feature", freeze_A=True), M * R),
        (Case(M, K, N, R, granularity="element"), M * K + M * R),
        (Case(M, K, N, R, granularity="feature", keep_input=True), M * K + M * R),
    ],
    ids=str,
)
def test_saved_bytes(case, expected):
    inputs = make_inputs(case)
    inputs.pop("dys")
    for name in ["lora_As"] * (not case.freeze_A) + ["lora_Bs"]:
        inputs[name] = [t.requires_grad_() for t in inputs[name]]
    partial = inputs["partial"] or Partial()
    held = [t for value in (*inputs.values(), *partial) if isinstance(value, list) for t in value]
    held += [partial.columns]
    ignore = [t for t in held if isinstance(t, torch.Tensor)]
    x = inputs.pop("x").requires_grad_()
    assert saved_bytes(lambda: lora_linear_group(x, keep_input=case.keep_input, **inputs), ignore) == ELEMENT * expected


def test_an_unused_output_costs_nothing_and_has_no_gradient():
    case = Case(4, 8, 6, 2, torch.float64, 3)
    inputs = make_inputs(case)
    dys = inputs.pop("dys")
    factors = [t.requires_grad_() for t in (*inputs["lora_As"], *inputs["lora_Bs"])]
    x = inputs.pop("x").requires_grad_()
    ys = lora_linear_group(x, **inputs)
    ys[1].backward(dys[1])
    assert [t.grad is None for t in factors] == [True, False, True] * 2
    y = lora_linear(x, inputs["weights"][1], inputs["lora_As"][1], inputs["lora_Bs"][1], inputs["biases"][1], scale=3.0)
    expected = torch.autograd.grad(y, x, dys[1])[0]
    assert_close(x.grad, expected, expected, torch.float64)


def test_masks_and_trainable_weights():
    case = Case(7, 9, 6, 2, torch.float64, 2, masks=True)
    inputs = make_inputs(case)
    have = run(inputs, case)
    for i in range(2):
        assert not have[f"dlora_A{i}"][~inputs["mask_As"][i]].any()
        assert not have[f"dlora_B{i}"][~inputs["mask_Bs"][i]].any()
    dys = inputs.pop("dys")
    weight, bias = (inputs[name][0].requires_grad_() for name in ("weights", "biases"))
    ys = lora_linear_group(inputs.pop("x"), **inputs)
    dweight, dbias = torch.autograd.grad(ys, [weight, bias], dys)
    expected = dys[0].t() @ make_inputs(case)["x"]
    assert_close(dweight, expected, expected, torch.float64)
    assert_close(dbias, dys[0].sum(0), dys[0].sum(0), torch.float64)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0, 4)])
def test_any_leading_shape(leading):
    inputs = make_inputs(Case(6, 8, 4, 2, members=2))
    inputs.pop("dys")
    inputs["x"] = torch.randn(*leading, 8, requires_grad=True)
    ys = lora_linear_group(**inputs)
    assert [y.shape for y in ys] == [(*leading, 4), (*leading, 9)]
    (ys[0].sum() + ys[1].sum()).backward()
    assert inputs["x"].grad.shape == inputs["x"].shape


def test_autocast_computes_what_linear_computes_and_keeps_the_uncast_x():
    inputs = make_inputs(Case(6, 8, 4, 2, members=2, bias=False))
    inputs.pop("dys")
    inputs["lora_Bs"] = [b.zero_() for b in inputs["lora_Bs"]]
    with torch.autocast("cpu", torch.bfloat16):
        ys = lora_linear_group(**inputs)
        for y, weight in zip(ys, inputs["weights"], strict=True):
            assert torch.equal(y, torch.nn.functional.linear(inputs["x"], weight))


def test_second_derivative_raises():
    case = Case(3, 4, 4, 2, torch.float64, 2)
    inputs = make_inputs(case)
    inputs.pop("dys")
    x = inputs.pop("x").requires_grad_()
    (gradient,) = torch.autograd.grad(
        sum(y.square().sum() for y in lora_linear_group(x, **inputs)), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("granularity", [None, "feature"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(granularity, dynamic):
    torch._dynamo.reset()
    case = Case(6, 16, 8, 2, members=2, granularity=granularity, dropout_p=0.25)
    inputs = make_inputs(case)
    expected = run(inputs, case)

    def function(seed, **arguments):
        return lora_linear_group(seed=torch.tensor(seed), **arguments)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for name, have in run(inputs, case, compiled).items():
        assert torch.equal(have, expected[name]), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    case = Case(6, 16, 8, 2, members=2, granularity="feature", dropout_p=0.25)
    inputs = make_inputs(case)
    expected = run(inputs, case)
    dys, x = inputs.pop("dys"), inputs.pop("x").requires_grad_()
    factors = {f"dlora_{name}{i}": inputs[f"lora_{name}s"][i].requires_grad_() for name in "AB" for i in range(2)}
    ys = torch.utils.checkpoint.checkpoint(
        lambda x: lora_linear_group(x, dropout_p=0.25, seed=1, **inputs), x, use_reentrant=reentrant
    )
    torch.autograd.backward(ys, dys)
    for name, leaf in (factors | {"dx": x}).items():
        assert torch.equal(leaf.grad, expected[name]), name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", [*cases([(5, 8, 6, 2)], [torch.float32])], ids=str)
def test_opcheck(backend, case, monkeypatch):
    calls = {}
    for table, name in ((ops.forward_ops, "forward"), (ops.backward_ops, "backward")):

        def record(*arguments, raw=table[backend], name=name):
            calls[name] = arguments
            return raw(*arguments)

        monkeypatch.setitem(table, backend, record)
    with lorasp.use_backend(backend):
        run(make_inputs(case), case)
    monkeypatch.undo()
    torch.library.opcheck(ops.forward_ops[backend], detach(calls["forward"]))
    torch.library.opcheck(ops.backward_ops[backend], detach(calls["backward"]))


@pytest.mark.parametrize("case", [*cases([(5, 8, 6, 2)], [torch.bfloat16])], ids=str)
def test_fake_cuda_metadata(case, monkeypatch):
    """Shapes, dtypes and device of a call on CUDA tensors, worked out on a machine without a GPU."""
    calls, inputs = {}, make_inputs(case)
    for table, name in ((ops.forward_ops, "forward"), (ops.backward_ops, "backward")):

        def record(*arguments, raw=table["reference"], name=name):
            calls[name] = arguments, raw(*arguments)
            return calls[name][1]

        monkeypatch.setitem(table, "reference", record)
    run(inputs, case)

    def on_cuda(value):
        if isinstance(value, list | tuple):
            return [on_cuda(item) for item in value]
        if isinstance(value, torch.Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        return value

    def described(value):
        if isinstance(value, list | tuple):
            return [described(item) for item in value]
        return tuple(value.shape), value.dtype

    for table, name in ((ops.forward_ops, "forward"), (ops.backward_ops, "backward")):
        arguments, results = calls[name]
        with torch._subclasses.FakeTensorMode():
            fakes = table["triton"](*on_cuda(arguments))
        assert described(fakes) == described(results)
        assert {t.device.type for item in fakes for t in ([item] if isinstance(item, torch.Tensor) else item)} == {
            "cuda"
        }


def detach(value):
    if isinstance(value, list | tuple):
        return [detach(item) for item in value]
    return value.detach() if isinstance(value, torch.Tensor) else value


def wrong(**changes):
    case = Case(4, 8, 6, 2, members=2, granularity=changes.pop("granularity", None))
    inputs = make_inputs(case)
    inputs.pop("dys")
    partial = changes.pop("partial", None)
    if partial is not None:
        inputs["partial"] = (inputs["partial"] or Partial())._replace(**partial)
    return inputs | changes


ONES = torch.ones
MESSAGES = [
    (wrong(weights=[]), "weights must hold at least one tensor"),
    (wrong(lora_As=[ONES(2, 8)]), r"lora_As must have one item per weight, 2, got 1"),
    (wrong(scales=[1.0, float("nan")]), "scales must be finite numbers, got nan"),
    (wrong(members=[0, -1]), r"members must be ints in \[0, 2\^32\), got -1"),
    (wrong(lora_Bs=[ONES(6, 2), ONES(11, 2)]), r"lora_Bs\[1\] must be \(11, 3\), got \(11, 2\)"),
    (wrong(plan="fast"), "plan must be one of"),
    (wrong(dropout_p=1.0), r"dropout_p must be in \[0, 1\)"),
    (wrong(biases=[None, ONES(5)]), r"biases\[1\] must be \(11,\), got \(5,\)"),
    (wrong(partial={"frozen_As": [ONES(2, 8), None]}), r"frozen_As\[0\] must come with columns or entries_A"),
    (wrong(partial={"entries_A": [torch.arange(2), None]}), r"entries_A\[0\] must come with frozen_As"),
    (wrong(granularity="feature", partial={"columns": torch.arange(3)}), r"lora_As\[0\] must be \(2, 3\), one column"),
    (wrong(granularity="feature", mask_As=[ONES(2, 8).bool(), None]), r"mask_As\[0\] must be None where only a part"),
    (wrong(granularity="element", partial={"columns": torch.arange(2)}), r"entries_A\[0\] must be None where columns"),
    (wrong(granularity="element", partial={"entries_B": [torch.arange(2)] * 2}), r"lora_Bs\[0\] must be \(2,\)"),
]


@pytest.mark.parametrize(("arguments", "message"), MESSAGES, ids=[message[:30] for _, message in MESSAGES])
def test_messages(arguments, message):
    with pytest.raises(ValueError, match=f"lora_linear_group: {message}"):
        lora_linear_group(**arguments)


def test_wrong_types():
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        lora_linear_group([1.0], [], [], [])
    with pytest.raises(TypeError, match=r"rows\[0\] must be torch.int64, got torch.float32"):
        lora_linear_group(**wrong(granularity="feature", partial={"rows": [ONES(3)] * 2}))

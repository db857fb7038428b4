"""LoRA-SP: what is chosen, that only it trains, and that freezing half halves what it can."""

import copy
import io
import pickle

import pytest
import torch
from partial_oracle import BETAS, EPS, WEIGHT_DECAY, Oracle, batches, loss
from tiny_model import Model
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorasp
from lorasp import LoRAConfig, LoRALinear, PartialConfig, inject, testing
from lorasp.config import ALL_LINEAR
from lorasp.memory import saved_bytes
from lorasp.models.inject import report as inject_report

K, N, R = 40, 24, 4
GRANULARITIES = ("feature", "element", "rank")
WITH_FREEZE_A = [
    *((granularity, freeze_A) for granularity in GRANULARITIES for freeze_A in (False, True)),
    ("matrix", False),
]
RESAMPLES = ("never", "epoch")


def layer_with_values(granularity="feature", resample="never", ratio=0.5, seed=0, **arguments) -> LoRALinear:
    """A layer whose low-rank term is as large as the frozen one, the frozen entries of B included."""
    torch.manual_seed(0)
    partial = PartialConfig(ratio, granularity, resample, seed)
    sizes = (arguments.pop("in_features", K), arguments.pop("out_features", N))
    return LoRALinear(*sizes, r=R, lora_alpha=2 * R, init_lora_weights=False, partial=partial, **arguments)


def width(seed: int) -> int:
    """How many of 1000 columns train: the last block of 64 is a short one."""
    return int(layer_with_values(in_features=1000, seed=seed).adapters.default.columns.numel())


def masks(layer: LoRALinear) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.trainable_mask_A(), layer.trainable_mask_B()


def trained(layer: LoRALinear) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


class TestSelection:
    @pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("in_features", [40, 511, 512, 1408])
    def test_feature_sizes(self, in_features, ratio):
        mask_A, mask_B = masks(layer_with_values(ratio=ratio, in_features=in_features))
        blocks = in_features // 64 if in_features >= 512 else in_features
        assert (mask_A == mask_A[0]).all()
        assert mask_A[0].sum() == round(ratio * blocks) * (in_features // blocks)
        if in_features >= 512:
            assert (mask_A[0].view(blocks, 64) == mask_A[0].view(blocks, 64)[:, :1]).all()
        assert (mask_B == mask_B[:, :1]).all()
        assert mask_B[:, 0].sum() == round(ratio * N)

    def test_the_last_block_may_be_short(self):
        assert {width(seed) for seed in range(20)} == {8 * 64, 7 * 64 + 1000 % 64}

    @pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
    def test_element_and_rank_sizes(self, ratio):
        mask_A, mask_B = masks(layer_with_values("element", ratio=ratio))
        assert (mask_A.sum(), mask_B.sum()) == (round(ratio * R * K), round(ratio * N * R))
        mask_A, mask_B = masks(layer_with_values("rank", ratio=ratio))
        assert torch.equal(mask_A, mask_A[:, :1].expand(R, K))
        assert torch.equal(mask_B, mask_A[:, 0].expand(N, R))
        assert mask_A[:, 0].sum() == round(ratio * R)

    @pytest.mark.parametrize("resample", RESAMPLES)
    def test_matrix_freezes_A_in_one_half_of_the_modules_and_B_in_the_other(self, resample):
        model = Model()
        inject(model, LoRAConfig(r=2, target_modules=["q_proj", "up"], partial=PartialConfig(0.5, "matrix", resample)))
        layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
        kinds = [
            (layer.trainable_mask_A().unique().tolist(), layer.trainable_mask_B().unique().tolist()) for layer in layers
        ]
        assert sorted(kinds) == [([False], [True])] * 3 + [([True], [False])] * 3
        for layer, (trains_A, _) in zip(layers, kinds, strict=True):
            random, zero = (layer.lora_B, layer.lora_A) if trains_A == [True] else (layer.lora_A, layer.lora_B)
            assert random.any()
            assert not zero.any()
        if resample == "epoch":
            lorasp.resample(model)
            assert kinds != [
                (layer.trainable_mask_A().unique().tolist(), layer.trainable_mask_B().unique().tolist())
                for layer in layers
            ]

    def test_it_follows_from_the_seed_and_the_name(self):
        config = LoRAConfig(r=2, target_modules=["q_proj"], partial=PartialConfig(seed=3))
        first, second = Model(), Model()
        for model in (first, second):
            inject(model, config)
        chosen = [layer.attention.q_proj.trainable_mask_A()[0].tolist() for layer in first.model.layers]
        assert chosen == [layer.attention.q_proj.trainable_mask_A()[0].tolist() for layer in second.model.layers]
        assert chosen[0] != chosen[1]
        assert not torch.equal(*(layer_with_values(seed=seed).trainable_mask_A() for seed in (0, 1)))

    def test_it_is_the_same_everywhere_and_forever(self):
        layer = LoRALinear(16, 8, r=2, partial=PartialConfig())
        assert layer.adapters.default.columns.tolist() == [1, 3, 4, 6, 7, 8, 9, 10]
        assert layer.adapters.default.rows.tolist() == [0, 3, 5, 7]

    def test_layers_on_one_input_share_their_columns_only(self):
        model = Model()
        inject(model, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], partial=PartialConfig()))
        q, v = (getattr(model.model.layers[0].attention, name) for name in ("q_proj", "v_proj"))
        before, rows = v.lora_A.clone(), v.trainable_mask_B()
        for layer in (q, v):
            layer.adapters.default.share("model.layers.0.attention.q_proj")
        assert torch.equal(q.trainable_mask_A(), v.trainable_mask_A())
        assert torch.equal(v.trainable_mask_B(), rows)
        assert not torch.equal(q.trainable_mask_B(), rows)
        assert torch.equal(v.lora_A, before)

    @pytest.mark.parametrize("resample", RESAMPLES)
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_by_scores_the_highest_are_kept(self, granularity, resample):
        layer = layer_with_values(granularity, resample)
        before = layer.lora_A.clone(), layer.lora_B.clone()
        score_A, score_B = torch.randn(R, K), torch.randn(N, R)
        layer.select(score_A, score_B)
        mask_A, mask_B = masks(layer)
        sums_A, sums_B = {
            "feature": (score_A.sum(0), score_B.sum(1)),
            "element": (score_A.flatten(), score_B.flatten()),
            "rank": (score_A.sum(1) + score_B.sum(0),) * 2,
        }[granularity]
        chosen_A, chosen_B = {
            "feature": (mask_A[0], mask_B[:, 0]),
            "element": (mask_A.flatten(), mask_B.flatten()),
            "rank": (mask_A[:, 0], mask_B[0]),
        }[granularity]
        for sums, chosen in ((sums_A, chosen_A), (sums_B, chosen_B)):
            assert chosen.sum() == round(chosen.numel() / 2)
            assert sums[chosen].min() > sums[~chosen].max()
        assert torch.equal(layer.lora_A, before[0])
        assert torch.equal(layer.lora_B, before[1])

    def test_scores_of_a_block_are_summed(self):
        layer = layer_with_values(in_features=1000, seed=next(s for s in range(20) if width(s) == 512))
        before, score_A = layer.lora_A.clone(), torch.zeros(R, 1000)
        score_A[1, 960:] = score_A[2, 7 * 64 - 1] = score_A[0, : 6 * 64] = 1.0
        layer.select(score_A, torch.zeros(N, R))
        chosen = layer.trainable_mask_A()[0]
        assert chosen[: 7 * 64].all()
        assert chosen[960:].all()
        assert chosen.sum() == 7 * 64 + 40
        assert layer.adapters.default.lora_A_packed.shape == (R, 7 * 64 + 40)
        assert torch.equal(layer.lora_A, before)

    def test_scores_for_a_model_choose_shared_columns_together(self):
        model = Model()
        inject(model, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], partial=PartialConfig()))
        names = [f"model.layers.0.attention.{name}" for name in ("q_proj", "v_proj")]
        q, v = (model.get_submodule(name) for name in names)
        for layer in (q, v):
            layer.adapters.default.share(names[0])
        low, high = torch.zeros(2, 8), torch.zeros(2, 8)
        low[0, :4], high[1, 4:] = 1.0, 2.0
        lorasp.select(model, {names[0]: (low, torch.rand(8, 2)), names[1]: (high, torch.rand(8, 2))})
        for layer in (q, v):
            assert layer.trainable_mask_A()[0].tolist() == [False] * 4 + [True] * 4
        before = masks(q)
        with pytest.raises(ValueError, match=r"must all have scores, missing: .*v_proj"):
            lorasp.select(model, {names[0]: (low, torch.rand(8, 2))})
        with pytest.raises(ValueError, match=r"got \['nowhere'\]"):
            lorasp.select(model, {"nowhere": (low, low)})
        with pytest.raises(ValueError, match="must be pairs"):
            lorasp.select(model, {names[0]: low})
        assert all(torch.equal(a, b) for a, b in zip(before, masks(q), strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize(("granularity", "freeze_A"), WITH_FREEZE_A)
@pytest.mark.parametrize(
    ("dtype", "masters"),
    [(torch.float64, None), (torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)],
)
def test_outputs_and_gradients_are_those_of_dense_lora_masked(dtype, masters, granularity, resample, freeze_A, dropout):
    layer = layer_with_values(
        granularity, resample, dtype=dtype, adapter_dtype=masters, freeze_A=freeze_A, lora_dropout=dropout
    )
    mask_A, mask_B = masks(layer)
    ((x, dy),) = batches(1, 9, layer, dtype)

    def dense(dtype, factors):
        leaves = [
            t.detach().to(d).requires_grad_() for t, d in ((x, dtype), (layer.lora_A, factors), (layer.lora_B, factors))
        ]
        torch.manual_seed(5)
        y = lorasp.lora_linear(
            leaves[0], layer.weight.to(dtype), leaves[1], leaves[2], layer.bias.to(dtype), scale=layer.scale,
            dropout_p=dropout,
        )  # fmt: skip
        return y, torch.autograd.grad(y, leaves, dy.to(dtype))

    with lorasp.use_backend("reference"):
        reference, grads = dense(dtype, masters or dtype)
        reference64, grads64 = dense(torch.float64, torch.float64)
    x.requires_grad_()
    torch.manual_seed(5)
    y = layer(x)
    y.backward(dy)
    testing.assert_close(y, reference, reference64, dtype, "y")
    testing.assert_close(x.grad, grads[0], grads64[0], dtype, "dx")
    adapter = layer.adapters.default
    for name, mask, grad, grad64 in (
        ("lora_A", mask_A, grads[1], grads64[1]),
        ("lora_B", mask_B, grads[2], grads64[2]),
    ):
        if hasattr(adapter, f"{name}_packed"):
            actual = getattr(adapter, f"{name}_packed").grad
            assert actual.dtype == (masters or dtype)
            testing.assert_close(actual.flatten(), grad[mask], grad64[mask], dtype, name)
        elif (actual := getattr(adapter, name).grad) is None:
            assert not mask.any()
        else:
            testing.assert_close(actual, grad * mask, grad64 * mask, dtype, name)
            assert not actual[~mask].any()


@pytest.mark.parametrize(("granularity", "freeze_A"), WITH_FREEZE_A)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_twenty_steps_of_adamw_are_those_of_dense_lora_with_everything_masked(dtype, granularity, freeze_A):
    layer = layer_with_values(granularity, dtype=dtype, freeze_A=freeze_A)
    oracle, oracle64 = Oracle(layer, dtype), Oracle(layer, torch.float64)
    mask_A, mask_B = masks(layer)
    first_A, first_B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    optimizer = torch.optim.AdamW(trained(layer), lr=1e-2, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    for x, target in batches(20, 32, layer, dtype):
        loss(layer(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        oracle64.step(x, target, mask_A, mask_B, 1e-2)
        # Rows in another order: what fp64's own rounding does to the plain computation.
        oracle.step(x.flip(0), target.flip(0), mask_A, mask_B, 1e-2)
    for name, first, mask, reference, reference64 in (
        ("lora_A", first_A, mask_A, oracle.A, oracle64.A),
        ("lora_B", first_B, mask_B, oracle.B, oracle64.B),
    ):
        last = getattr(layer, name)
        testing.assert_close(last, reference.value, reference64.value, dtype, name)
        assert torch.equal(last[~mask], first[~mask])
        assert not (last == first)[mask].any()


class TestCost:
    """Half of the entries: half of everything that can be halved."""

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_parameters_gradients_and_optimizer_state_halve(self, granularity):
        layer, (x, target) = layer_with_values(granularity), (torch.randn(5, K), torch.randn(5, N))
        optimizer = torch.optim.AdamW(trained(layer))
        loss(layer(x), target).backward()
        optimizer.step()
        half = R * (K + N) // 2
        assert sum(p.numel() for p in trained(layer)) == half
        assert sum(p.grad.numel() for p in trained(layer)) == half
        assert sum(s[name].numel() for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")) == 2 * half

    @pytest.mark.parametrize("target", ["q_proj", "up"])
    def test_a_report_counts_what_trains(self, target):
        reports = []
        for partial in (None, PartialConfig()):
            inject(model := Model(), LoRAConfig(r=2, target_modules=[target], partial=partial))
            reports.append(inject_report(model, {}, ()))
        assert reports[1].trainable * 2 == reports[0].trainable
        assert reports[1].total == reports[0].total

    @pytest.mark.parametrize("dropout", [0.0, 0.25])
    @pytest.mark.parametrize("resample", RESAMPLES)
    @pytest.mark.parametrize(("in_features", "columns"), [(K, K // 2), (1024, 512)])
    def test_a_feature_set_keeps_its_columns_of_x(self, in_features, columns, resample, dropout):
        layer = layer_with_values(resample=resample, in_features=in_features, lora_dropout=dropout)
        x = torch.randn(2, 6, in_features)
        expected = 12 * (columns + R) * 4 + 8 * (dropout > 0)
        assert saved_bytes(lambda: layer(x), exclude=layer) == expected

    def test_half_precision_with_masters_keeps_half_precision_columns(self):
        layer = layer_with_values(dtype=torch.bfloat16, adapter_dtype=torch.float32)
        x = torch.randn(12, K, dtype=torch.bfloat16)
        assert saved_bytes(lambda: layer(x), exclude=layer) == 12 * (K // 2 + R) * 2

    def test_all_features_are_no_copy_of_x(self):
        whole, x = layer_with_values(ratio=1.0), torch.randn(12, K)
        assert saved_bytes(lambda: whole(x), exclude=[whole, x]) == 12 * R * 4

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_with_A_frozen_x_is_not_kept(self, granularity):
        layer = layer_with_values(granularity, freeze_A=True)
        assert saved_bytes(lambda: layer(torch.randn(12, K)), exclude=layer) == 12 * R * 4

    def test_the_zero_half_of_B_is_not_stored(self):
        layer = LoRALinear(K, N, r=R, partial=PartialConfig())
        assert layer.adapters.default.frozen_B is None
        fresh = set(layer.state_dict())
        layer.set_lora(layer.lora_A, torch.ones(N, R))
        assert set(layer.state_dict()) == fresh | {"adapters.default.frozen_B"}
        assert (layer.lora_B == 1).all()
        layer.set_lora(layer.lora_A, layer.lora_B * layer.trainable_mask_B())
        assert layer.adapters.default.frozen_B is None


class TestModule:
    """What modules go through."""

    @pytest.mark.parametrize("freeze_A", [False, True])
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_state_dict_keys(self, granularity, freeze_A):
        layer = LoRALinear(K, N, r=R, partial=PartialConfig(0.5, granularity), freeze_A=freeze_A)
        A = {"lora_A"} if freeze_A else {"lora_A_packed", "frozen_A", "active_A"}
        keys = {f"adapters.default.{name}" for name in {*A, "lora_B_packed", "active_B"}}
        assert set(layer.state_dict()) == {"weight", "bias", *keys}
        layer.requires_grad_(True)
        trainable = {name for name, parameter in layer.named_parameters() if "adapters" in name}
        assert trainable == {key for key in keys if key.endswith("packed")}

    @pytest.mark.parametrize("freeze_A", [False, True])
    @pytest.mark.parametrize("resample", RESAMPLES)
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "torch.save"])
    def test_copies_compute_and_train_the_same(self, way, granularity, resample, freeze_A):
        layer, x = layer_with_values(granularity, resample, freeze_A=freeze_A), torch.randn(6, K)
        if way == "deepcopy":
            twin = copy.deepcopy(layer)
        elif way == "pickle":
            twin = pickle.loads(pickle.dumps(layer))
        elif way == "torch.save":
            torch.save(layer, file := io.BytesIO())
            twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        else:
            twin = layer_with_values(granularity, resample, seed=9, freeze_A=freeze_A)
            assert not all(torch.equal(a, b) for a, b in zip(masks(twin), masks(layer), strict=True))
            twin.load_state_dict(layer.state_dict())
        assert torch.equal(twin(x), layer(x))
        assert all(torch.equal(a, b) for a, b in zip(masks(twin), masks(layer), strict=True))
        for one in (layer, twin):
            one(x).square().sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(trained(twin), trained(layer), strict=True))

    def test_a_state_dict_brings_a_selection_of_another_size(self):
        short, full = (
            layer_with_values(in_features=1000, seed=next(s for s in range(20) if width(s) == size))
            for size in (488, 512)
        )
        parameters, x = trained(short), torch.randn(3, 1000)
        short.load_state_dict(full.state_dict())
        assert trained(short)[0] is parameters[0]
        assert torch.equal(short(x), full(x))

    def test_a_dense_state_dict_is_refused_by_name(self):
        with pytest.raises(RuntimeError, match=r"Missing key.*lora_A_packed[\s\S]*Unexpected key.*lora_A"):
            LoRALinear(K, N, r=R, partial=PartialConfig()).load_state_dict(LoRALinear(K, N, r=R).state_dict())

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_to_dtype(self, granularity):
        layer = layer_with_values(granularity).to(torch.bfloat16)
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16
        layer(torch.randn(2, K, dtype=torch.bfloat16)).sum().backward()
        assert {parameter.grad.dtype for parameter in trained(layer)} == {torch.bfloat16}

    @pytest.mark.parametrize("resample", RESAMPLES)
    @pytest.mark.parametrize("granularity", [*GRANULARITIES, "matrix"])
    def test_meta_device_has_shapes_and_can_be_made_real(self, granularity, resample):
        partial = PartialConfig(0.5, granularity, resample)
        layer = LoRALinear(K, N, r=R, partial=partial, device="meta")
        assert layer(torch.empty(2, 3, K, device="meta")).shape == (2, 3, N)
        layer.to_empty(device="cpu").reset_parameters()
        real = LoRALinear(K, N, r=R, partial=partial)
        assert all(torch.equal(a, b) for a, b in zip(masks(layer), masks(real), strict=True))
        x = torch.randn(2, K)
        plain = nn.functional.linear(x, layer.weight, layer.bias)
        exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        testing.assert_close(layer(x), plain, exact, torch.float32)

    @pytest.mark.parametrize("resample", RESAMPLES)
    @pytest.mark.parametrize("granularity", ["feature", "element", "matrix"])
    def test_compiles_in_one_graph(self, granularity, resample):
        layer, x = layer_with_values(granularity, resample, lora_dropout=0.5), torch.randn(6, K)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        compiled(x).sum().backward()
        layer.eval()
        assert torch.equal(compiled(x), layer(x))

    @pytest.mark.parametrize("granularity", ["feature", "rank"])
    def test_a_compiled_layer_follows_its_resampling(self, granularity):
        layer, x = layer_with_values(granularity, "epoch"), torch.randn(6, K)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            layer.zero_grad()
            compiled(x).square().sum().backward()
            for factor, mask in zip((layer.lora_A, layer.lora_B), masks(layer), strict=True):
                assert not factor.grad[~mask].any()
                assert factor.grad[mask].all()
            lorasp.resample(layer)

    def test_a_layer_on_the_meta_device_takes_a_state_dict_as_it_is(self):
        real = layer_with_values(in_features=1000, seed=next(s for s in range(20) if width(s) == 488))
        meta = layer_with_values(in_features=1000, seed=next(s for s in range(20) if width(s) == 512), device="meta")
        meta.load_state_dict(real.state_dict(), assign=True)
        x = torch.randn(3, 1000)
        assert torch.equal(meta(x), real(x))

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_autocast_computes_in_its_dtype(self, granularity):
        layer, x = layer_with_values(granularity), torch.randn(6, K, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.sum().backward()
        assert y.dtype == torch.bfloat16
        assert {x.grad.dtype, *(parameter.grad.dtype for parameter in trained(layer))} == {torch.float32}

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_activation_checkpointing_redraws_the_same_mask(self, granularity, use_reentrant):
        """After eval mode the arguments are checked again in the forward, but not in its recompute."""
        layer, x = layer_with_values(granularity, lora_dropout=0.5), torch.randn(16, K, requires_grad=True)
        gradients = []
        for function in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
            layer.eval()(x)
            layer.train()
            torch.manual_seed(3)
            function(x).square().sum().backward()
            gradients.append([leaf.grad for leaf in (x, *trained(layer))])
            x.grad = None
            layer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(N, K - 1), False)),
                r"weights\[0\] must be",
            ),
            (lambda layer: setattr(layer, "bias", nn.Parameter(torch.zeros(1), False)), r"biases\[0\] must be"),
            (lambda layer: setattr(trained(layer)[1], "data", torch.zeros(1, R)), r"lora_Bs\[0\] must be"),
            (lambda layer: layer.adapters.to("meta"), "must be on cpu like x, got meta"),
        ],
    )
    def test_what_changes_after_a_call_is_checked_again(self, change, message):
        layer, x = layer_with_values(), torch.randn(2, K)
        for _ in range(2):
            layer(x)
        change(layer)
        with pytest.raises(ValueError, match=message):
            layer(x)

    @pytest.mark.parametrize("freeze_A", [False, True])
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_what_trains_may_be_cast_alone(self, granularity, freeze_A):
        layer = layer_with_values(granularity, freeze_A=freeze_A, dtype=torch.bfloat16)
        x, before = torch.randn(2, K, dtype=torch.bfloat16), (layer.lora_A.float(), layer.lora_B.float())
        y = layer(x)
        for parameter in trained(layer):
            parameter.data = parameter.data.float()
        assert torch.equal(layer(x), y)
        assert all(torch.equal(new, old) for new, old in zip((layer.lora_A, layer.lora_B), before, strict=True))
        layer.set_lora(*before)
        assert torch.equal(layer(x), y)

    def test_prepacked_weights_serve_it(self):
        if lorasp.available_backends()["cpp"] is not None:
            pytest.skip("packed weights need the C++ backend")
        layer, x = layer_with_values(prepack=True), torch.randn(6, K)
        exact = copy.deepcopy(layer).double()
        exact.prepack = False
        plain = nn.functional.linear(x, layer.weight, layer.bias) + layer.scale * (
            x @ layer.lora_A.t() @ layer.lora_B.t()
        )
        testing.assert_close(layer(x), plain, exact(x.double()), torch.float32)
        assert layer.packed is not None

    def test_says_what_it_is(self):
        text = repr(LoRALinear(K, N, r=R, partial=PartialConfig(0.25, "element", 10)))
        assert "trainable_ratio=0.25, granularity='element', resample=10" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trainable_ratio": 0.0}, r"trainable_ratio must be in \(0, 1\], got 0.0"),
        ({"trainable_ratio": 1.5}, r"trainable_ratio must be in \(0, 1\], got 1.5"),
        ({"granularity": "layer"}, "granularity must be one of feature, element, rank, matrix, got 'layer'"),
        (
            {"granularity": "matrix", "trainable_ratio": 0.7},
            "trainable_ratio must be 0.5 for granularity 'matrix', got 0.7",
        ),
        ({"resample": 0}, "resample must be 'never', 'epoch' or an int >= 1, got 0"),
        ({"resample": "always"}, "resample must be 'never', 'epoch' or an int >= 1, got 'always'"),
        ({"resample": True}, "resample must be 'never', 'epoch' or an int >= 1, got True"),
        ({"seed": 0.5}, "seed must be an int"),
    ],
)
def test_a_config_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"PartialConfig: {message}"):
        PartialConfig(**arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LoRALinear(K, N, partial=0.5), "LoRALinear: partial must be a PartialConfig or None, got 0.5"),
        (
            lambda: LoRALinear(K, N, freeze_A=True, partial=PartialConfig(0.5, "matrix")),
            "LoRALinear: partial must not be of granularity 'matrix' with freeze_A",
        ),
        (
            lambda: LoRALinear(K, N, partial=PartialConfig(0.01)),
            "leaves nothing of lora_A to train in layer ''.*40 unit",
        ),
        (lambda: LoRALinear(K, 1, partial=PartialConfig()), "leaves nothing of lora_B to train in layer ''.*1 unit"),
        (
            lambda: LoRALinear(K, N).select(torch.ones(8, K), torch.ones(N, 8)),
            "select: the layer must have a PartialConfig",
        ),
        (
            lambda: layer_with_values().select(torch.ones(R, N), torch.ones(N, R)),
            r"score_A must be \(4, 40\), got \(4, 24\)",
        ),
        (lambda: layer_with_values().select(None, torch.ones(N, R)), "score_A must be given"),
        (lambda: layer_with_values().select(torch.ones(R, K), torch.full((N, R), torch.nan)), "score_B must be finite"),
        (
            lambda: layer_with_values().set_lora(torch.ones(R, N), torch.ones(N, R)),
            r"set_lora: lora_A must be \(4, 40\)",
        ),
        (lambda: lorasp.resample(layer_with_values()), "resample: model must have adapters with PartialConfig"),
    ],
)
def test_refused(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_a_refused_selection_names_the_layer_and_changes_nothing():
    model = Model()
    with pytest.raises(ValueError, match=r"in layer 'model\.layers\.0\.attention\.q_proj'"):
        inject(model, LoRAConfig(r=2, target_modules=ALL_LINEAR, partial=PartialConfig(0.01)))
    assert not any(isinstance(module, LoRALinear) for module in model.modules())

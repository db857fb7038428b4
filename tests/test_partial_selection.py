"""LoRA-SP: what is chosen, by chance or by scores, and what cannot be."""

import pytest
import torch
from partial_layers import GRANULARITIES, RESAMPLES, K, N, R, layer_with_values, masks, width
from tiny_model import Model

import lorasp
from lorasp import LoRAConfig, LoRALinear, PartialConfig, inject
from lorasp.config import ALL_LINEAR


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

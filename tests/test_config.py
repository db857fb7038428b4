"""The configs: what is refused on construction, and how names are matched."""

import dataclasses

import pytest
import torch

from lorasp.config import HiddenKeyConfig, LoRAConfig, layer_index, matches_names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r must be an int >= 1, got 0"),
        ({"r": 2.0}, "r must be an int >= 1, got 2.0"),
        ({"r": True}, "r must be an int >= 1, got True"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
        ({"lora_alpha": "8"}, "lora_alpha must be a finite number, got '8'"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout must be in \[0, 1\), got -0.1"),
        ({"freeze_A": 1}, "freeze_A must be a bool, got 1"),
        ({"use_rslora": None}, "use_rslora must be a bool, got None"),
        ({"prepack": "yes"}, "prepack must be a bool, got 'yes'"),
        ({"bias": "some"}, "bias must be one of none, all, lora_only, got 'some'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, False or 'gaussian', got 'pissa'"),
        ({"init_lora_weights": 1}, "init_lora_weights must be True, False or 'gaussian', got 1"),
        ({"adapter_dtype": torch.bfloat16}, "adapter_dtype must be None .* got torch.bfloat16"),
        ({"target_modules": ""}, "target_modules must not be empty"),
        ({"target_modules": []}, "target_modules must not be empty"),
        ({"target_modules": "(q"}, r"target_modules must be a regular expression, got '\(q'"),
        ({"target_modules": 3}, "target_modules must be a str or a list of str, got 3"),
        ({"target_modules": ["q", 1]}, "target_modules must hold non-empty strings"),
        ({"exclude_modules": "[", "target_modules": ["q"]}, "exclude_modules must be a regular expression"),
        ({"modules_to_save": "score"}, "modules_to_save must be a list of str, got 'score'"),
        ({"rank_pattern": ["q"]}, "rank_pattern must be a dict"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be an int >= 1, got 0"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern must be a regular expression"),
        ({"alpha_pattern": {"q": "x"}}, r"alpha_pattern\['q'\] must be a finite number, got 'x'"),
        ({"layers_to_transform": [0, -1], "target_modules": ["q"]}, "layers_to_transform must be an int >= 0"),
        ({"layers_to_transform": 1, "target_modules": ".*q"}, "layers_to_transform needs target_modules to be a list"),
        ({"layers_pattern": "h", "target_modules": ["q"]}, "layers_pattern needs layers_to_transform"),
        ({"recompute_mlp": "all"}, "recompute_mlp must be a bool, 'activation' or 'full', got 'all'"),
        ({"recompute_mlp": 1.0}, "recompute_mlp must be a bool"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match=f"^LoRAConfig: {message}"):
        LoRAConfig(**arguments)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRAConfig().r = 4


def test_lists_and_sets_become_tuples():
    config = LoRAConfig(target_modules={"v", "q"}, modules_to_save=["score"], layers_to_transform=2, layers_pattern="h")
    assert config.target_modules == ("q", "v")
    assert config.modules_to_save == ("score",)
    assert config.layers_to_transform == (2,)
    assert config.layers_pattern == ("h",)
    assert LoRAConfig(target_modules=["q"], layers_to_transform=[]).layers_to_transform is None


@pytest.mark.parametrize(
    ("name", "r", "lora_alpha"),
    [
        ("model.layers.0.q_proj", 2, 8),  # the first matching key wins
        ("model.layers.1.q_proj", 4, 8),
        ("q_proj", 4, 8),
        ("model.layers.1.v_proj", 8, 32),
        ("model.layers.1.my_v_proj", 8, 8),  # a key starts at a dot
    ],
)
def test_patterns_override_by_the_end_of_the_name(name, r, lora_alpha):
    config = LoRAConfig(rank_pattern={r"layers\.0\.q_proj": 2, "q_proj": 4}, alpha_pattern={"v_proj": 32})
    assert (config.for_module(name).r, config.for_module(name).lora_alpha) == (r, lora_alpha)


@pytest.mark.parametrize(
    ("names", "name", "fits"),
    [
        (("q_proj",), "model.q_proj", True),
        (("q_proj",), "q_proj", True),
        (("q_proj",), "model.xq_proj", False),
        (("0.q_proj",), "model.0.q_proj", True),
        (r".*\.q_proj", "model.q_proj", True),
        ("q_proj", "model.q_proj", False),
    ],
)
def test_lists_match_ends_and_strings_match_whole_names(names, name, fits):
    assert matches_names(names, name) is fits


@pytest.mark.parametrize(
    ("name", "patterns", "index"),
    [
        ("model.layers.3.mlp.experts.0.up", None, 3),
        ("layers.3.up", None, None),  # PEFT's default rule wants something before the numbered list
        ("layers.3.up", ("layers",), 3),
        ("encoder.block.1.layer.0.q", ("layer",), 0),
        ("encoder.block.1.layer.0.q", ("h", "block"), 1),
        ("model.norm", None, None),
    ],
)
def test_layer_index(name, patterns, index):
    assert layer_index(name, patterns) == index


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_p": 1.0}, r"attention_p must be in \[0, 1\), got 1.0"),
        ({"attention_p": 1 - 2**-18}, r"attention_p must be in \[0, 1\), got 0.999996"),
        ({"hidden_p": -0.1}, r"hidden_p must be in \[0, 1\), got -0.1"),
        ({"hidden_p": "0.1"}, r"hidden_p must be in \[0, 1\), got '0.1'"),
        ({"attention_pattern": "row"}, "attention_pattern must be one of column, element, span, got 'row'"),
        ({"hidden_pattern": None}, "hidden_pattern must be one of column, element, span, got None"),
        ({"loss": "mse"}, "loss must be 'kl', 'js' or None, got 'mse'"),
        ({"loss_weight": -1}, "loss_weight must be a finite number >= 0, got -1"),
        ({"both_branches": 1}, "both_branches must be a bool, got 1"),
        ({"both_branches": True, "loss": "js"}, "both_branches needs loss='kl', two dropout passes, got 'js'"),
        ({"disable_other_dropout": None}, "disable_other_dropout must be a bool, got None"),
        ({"layers": "all"}, "layers must be 'auto', a list of indices >= 0 or a list of names, got 'all'"),
        ({"layers": []}, r"layers must be 'auto', .* got \[\]"),
        ({"layers": [0, -1]}, r"layers must be 'auto', .* got \[0, -1\]"),
        ({"layers": [0, "block.1"]}, "layers must be 'auto'"),
        ({"layers": [True]}, "layers must be 'auto'"),
        ({"layers": 3}, "layers must be 'auto', .* got 3"),
    ],
)
def test_hiddenkey_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match=f"^HiddenKeyConfig: {message}"):
        HiddenKeyConfig(**arguments)


def test_hiddenkey_config_is_frozen_and_hashable():
    config = HiddenKeyConfig(layers=[1, 2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.loss = None
    assert config.layers == (1, 2)
    assert len({config, HiddenKeyConfig(layers=(1, 2))}) == 1

"""PEFT is the same function, and its files are our files: small transformers models built from configs."""

import copy
import json
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lorasp import (
    LoRAConfig,
    LoRALinear,
    PartialConfig,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    testing,
)

SIZES = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4, "num_hidden_layers": 2}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=2))


def roberta() -> nn.Module:
    sizes = SIZES | {"max_position_embeddings": 32}
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes, **TOKENS))


def t5() -> nn.Module:
    sizes = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **ids))


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **TOKENS))


# What people adapt in each; GPT-2's layers are Conv1D.
TARGETS = {
    llama: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    roberta: ["query", "value"],
    t5: ["q", "v", "wi", "wo"],
    gpt2: ["c_attn", "c_proj"],
}

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {r"0\..*(value|v|v_proj|c_attn)": 2}, "alpha_pattern": {".*1.*": 3}},
    "layers": {"layers_to_transform": [1]},
    "bias_lora_only": {"bias": "lora_only"},
    "bias_all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["classifier"]},
    "modules_to_save_and_biases": {"modules_to_save": ["classifier"], "bias": "all"},
}


def build(make, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Weights a little larger than a trained model's, so that every layer matters to the output."""
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def arguments(make, variant: str = "plain") -> dict:
    return {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[make], "init_lora_weights": False} | VARIANTS[variant]


def peft_model(model: nn.Module, **config) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        return get_peft_model(copy.deepcopy(model), LoraConfig(**config))


def move(model: nn.Module, seed: int = 1) -> None:
    """Stand for training: whatever trains has moved."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 8)


def low_rank(model: nn.Module) -> dict[str, Tensor]:
    """lora_A and lora_B of either library by the name of the adapted layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            if module.active_adapter in module.adapters:
                found[f"{name} A"], found[f"{name} B"] = module.lora_A, module.lora_B
        elif hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            name = name.removeprefix("base_model.model.")
            (active,) = module.active_adapters
            if active in module.lora_A:
                found[f"{name} A"], found[f"{name} B"] = module.lora_A[active].weight, module.lora_B[active].weight
    return found


def logits_of(model: nn.Module, generator: torch.Generator | None = None) -> Tensor:
    generator = generator or torch.Generator().manual_seed(5)
    inputs = {"input_ids": torch.randint(3, 48, (2, 7), generator=generator)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 48, (2, 5), generator=generator)
    return model(**inputs).logits


def run(model: nn.Module) -> dict[str, Tensor]:
    """Outputs and the gradients of the low-rank tensors that train."""
    generator = torch.Generator().manual_seed(5)
    logits = logits_of(model, generator)
    direction = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)
    training = {name: tensor for name, tensor in low_rank(model).items() if tensor.requires_grad and tensor.is_leaf}
    gradients = torch.autograd.grad(logits, list(training.values()), direction) if training else ()
    return {"logits": logits.detach()} | dict(zip(training, gradients, strict=True))


def assert_same_function(ours: nn.Module, peft: nn.Module) -> None:
    """Whole models, so in fp64, against PEFT's fp32 and fp64.

    A chain of softmaxes amplifies one early rounding into the whole of a gradient's error; between two computations
    that round differently the ratio of two such errors is a matter of luck, and the rule would test that luck.
    """
    actual = run(copy.deepcopy(ours).double())
    assert_close(actual, run(peft), run(copy.deepcopy(peft).double()))


def assert_close(actual: dict[str, Tensor], reference: dict[str, Tensor], reference64: dict[str, Tensor]) -> None:
    assert actual.keys() == reference.keys()
    for name in actual:
        testing.assert_close(actual[name], reference[name], reference64[name], torch.float32, name)


def adapted(peft: PeftModel) -> dict[str, nn.Module]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in peft.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
    }


@pytest.mark.parametrize("make", [roberta, gpt2])
def test_pefts_several_adapters_load_and_switch_as_in_peft(make, tmp_path):
    peft = peft_model(build(make), **arguments(make, "modules_to_save"))
    peft.add_adapter("other", LoraConfig(**arguments(make, "rslora") | {"r": 2, "target_modules": TARGETS[make][:1]}))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or ".modules_to_save." in name:
                parameter.add_(torch.randn_like(parameter) / 8)
    peft.save_pretrained(tmp_path)
    ours = build(make)
    load_adapter(ours, tmp_path)
    load_adapter(ours, tmp_path / "other", "other")
    base = build(make)
    for name in ("default", "other", "default"):
        peft.set_adapter(name)
        set_adapter(ours, name)
        assert_same_logits(ours, peft)
        with disable_adapter(ours):
            assert torch.equal(logits_of(ours), logits_of(base))
    merge(ours)
    peft.merge_adapter()
    assert_same_logits(ours, peft)


def pair(make, freeze_A: bool) -> tuple[nn.Module, PeftModel]:
    """One model adapted by lorasp and by PEFT, with the same A and B."""
    model = build(make)
    peft = peft_model(model, **arguments(make))
    inject(model, LoRAConfig(**arguments(make), freeze_A=freeze_A))
    theirs, ours = low_rank(peft), low_rank(model)
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name in ours:
            ours[name].copy_(theirs[name])
            theirs[name].requires_grad_(ours[name].requires_grad)
    return model, peft


@pytest.mark.parametrize("freeze_A", [False, True])
@pytest.mark.parametrize("make", TARGETS)
def test_outputs_and_adapter_gradients_agree(make, freeze_A):
    assert_same_function(*pair(make, freeze_A))


@pytest.mark.parametrize("freeze_A", [False, True])
@pytest.mark.parametrize("make", TARGETS)
def test_every_layer_agrees_on_what_reaches_it_in_the_model(make, freeze_A):
    ours, peft = pair(make, freeze_A)
    met = {}

    def record(name):
        def hook(module, inputs, output):
            output.register_hook(lambda dy: met.__setitem__(name, (inputs[0].detach(), dy)))

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in adapted(peft).items()]
    run(peft)
    for handle in handles:
        handle.remove()
    assert met.keys() == adapted(peft).keys()

    def layer_run(module, name, dtype=torch.float32):
        x, dy = (tensor.to(dtype) for tensor in met[name])
        training = [tensor for tensor in low_rank(nn.ModuleDict({"layer": module})).values() if tensor.requires_grad]
        y = module(x.requires_grad_())
        gradients = torch.autograd.grad(y, [x, *training], dy)
        return {"y": y.detach()} | {f"{name}[{i}]": gradient for i, gradient in enumerate(gradients)}

    for name, module in adapted(peft).items():
        reference64 = layer_run(copy.deepcopy(module).double(), name, torch.float64)
        assert_close(layer_run(ours.get_submodule(name), name), layer_run(module, name), reference64)


@pytest.mark.parametrize("make", TARGETS)
def test_all_linear_means_the_same_layers(make):
    model = build(make)
    peft = peft_model(model, r=2, target_modules="all-linear")
    inject(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert low_rank(model).keys() == low_rank(peft).keys()


CASES = [
    pytest.param(make, variant, id=f"{make.__name__}-{variant}")
    for make in TARGETS
    for variant in VARIANTS
    if "modules_to_save" not in variant or make is roberta
]


@pytest.mark.parametrize(("make", "variant"), CASES)
def test_pefts_files_load_here(make, variant, tmp_path):
    peft = peft_model(build(make), **arguments(make, variant))
    move(peft)
    peft.save_pretrained(tmp_path)
    ours = build(make)
    load_adapter(ours, tmp_path)
    assert_same_function(ours, peft)
    prepared = build(make)
    inject(prepared, LoRAConfig(**arguments(make, variant)))
    load_adapter(prepared, tmp_path)
    loaded, expected = prepared.state_dict(), ours.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("make", "variant"), CASES)
def test_our_files_load_in_peft(make, variant, tmp_path):
    ours = build(make)
    inject(ours, LoRAConfig(**arguments(make, variant), freeze_A=True))
    move(ours)
    save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        peft = PeftModel.from_pretrained(build(make), tmp_path)
    for name, tensor in low_rank(peft).items():
        tensor.requires_grad_(name.endswith(" B"))
    assert_same_function(ours, peft)


@pytest.mark.parametrize("granularity", ["feature", "element", "rank", "matrix"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_adapters_of_which_a_part_trained_go_to_peft_and_back(make, granularity, tmp_path):
    partial = PartialConfig(0.5, granularity)
    ours = build(make)
    inject(ours, LoRAConfig(**arguments(make), partial=partial))
    move(ours)
    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        peft = PeftModel.from_pretrained(build(make), tmp_path / "ours", is_trainable=True)
    assert_same_logits(ours, peft)
    move(peft)
    peft.save_pretrained(tmp_path / "theirs")
    back = build(make)
    inject(back, LoRAConfig(**arguments(make), partial=partial))
    load_adapter(back, tmp_path / "theirs")
    assert_same_logits(back, peft)


def assert_same_logits(ours: nn.Module, peft: nn.Module) -> None:
    actual, exact = (logits_of(copy.deepcopy(model).double()) for model in (ours, peft))
    testing.assert_close(actual, logits_of(peft), exact, torch.float32)


def test_a_pair_that_peft_wrote_again_is_pefts_own(tmp_path):
    ours = build(llama)
    inject(ours, LoRAConfig(**arguments(llama)))
    save_adapter(ours, tmp_path)
    peft = PeftModel.from_pretrained(build(llama), tmp_path, is_trainable=True)
    move(peft)
    peft.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    assert_same_function(ours, peft)


def test_pefts_fp32_masters_over_a_bf16_base(tmp_path):
    peft = peft_model(build(llama, torch.bfloat16), **arguments(llama))
    peft.save_pretrained(tmp_path)
    ours = build(llama, torch.bfloat16)
    load_adapter(ours, tmp_path)
    theirs = low_rank(peft)
    assert {tensor.dtype for tensor in theirs.values()} == {torch.float32}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in low_rank(ours).items())


def test_config_files_agree_but_for_what_only_peft_has(tmp_path):
    config = arguments(gpt2) | {"lora_dropout": 0.1, "init_lora_weights": True}
    peft_model(build(gpt2), **config).save_pretrained(tmp_path / "peft")
    inject(model := build(gpt2), LoRAConfig(**config))
    save_adapter(model, tmp_path / "lorasp")
    theirs, ours = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("peft", "lorasp"))
    for written in (theirs, ours):
        written["target_modules"] = sorted(written["target_modules"])
    assert ours.items() <= theirs.items()

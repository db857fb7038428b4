"""What backward keeps, to the byte: one layer, q/k/v on one input, and a whole model."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

import lorasp
from lorasp import LoRAConfig, LoRALinear, PartialConfig, inject, recompute_mlp
from lorasp.memory import saved_bytes

M, K, N, R = 24, 40, 56, 4
SEED = 8
MIB = 2**20


def layer(**arguments) -> LoRALinear:
    return LoRALinear(K, N, r=R, **arguments)


def freeze(tensor: torch.Tensor) -> None:
    tensor.requires_grad_(False)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("x_needs_grad", [False, True])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("case", ["A and B train", "A frozen", "A frozen as a Parameter", "B frozen", "nothing trains"])
def test_one_layer(case, dtype, adapter_dtype, x_needs_grad, dropout):
    module = layer(freeze_A=case == "A frozen", dtype=dtype, adapter_dtype=adapter_dtype, lora_dropout=dropout)
    if case in ("A frozen as a Parameter", "nothing trains"):
        freeze(module.lora_A)
    if case in ("B frozen", "nothing trains"):
        freeze(module.lora_B)
    x = torch.randn(M, K, dtype=dtype, requires_grad=x_needs_grad)
    trains_A, trains_B = module.lora_A.requires_grad, module.lora_B.requires_grad
    # Only the mask of dx and of dA needs the seed.
    seed = SEED if dropout and (x_needs_grad or trains_A) else 0
    expected = M * (K * trains_A + R * trains_B) * dtype.itemsize + seed
    assert saved_bytes(lambda: module(x), exclude=module) == expected


@pytest.mark.parametrize("freeze_A", [False, True])
def test_a_transposed_weight_is_not_copied(freeze_A):
    conv = transformers.pytorch_utils.Conv1D(N, K)
    module = LoRALinear.from_linear(conv, LoRAConfig(r=R, freeze_A=freeze_A))
    x = torch.randn(M, K, requires_grad=True)
    assert saved_bytes(lambda: module(x), exclude=module) == M * (K * (not freeze_A) + R) * 4


def test_packed_weights_are_weights():
    if lorasp.available_backends()["cpp"] is not None:
        pytest.skip("packed weights need the C++ backend")
    module = layer(prepack=True, freeze_A=True)
    x = torch.randn(M, K, requires_grad=True)
    assert saved_bytes(lambda: module(x), exclude=module) == M * R * 4
    assert saved_bytes(lambda: module(x), exclude=(*module.parameters(), *module.buffers())) > M * R * 4


def test_a_trained_weight_needs_x_once():
    module = layer()
    module.requires_grad_(True)
    x = torch.randn(M, K)
    assert saved_bytes(lambda: module(x), exclude=module) == M * (K + R) * 4


@pytest.mark.parametrize("freeze_A", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_uncast_input_and_no_cast_weight(x_dtype, freeze_A):
    module, x = layer(freeze_A=freeze_A), torch.randn(M, K, dtype=x_dtype, requires_grad=True)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            module(x)

    assert saved_bytes(forward, exclude=module) == M * (R * 2 + K * x_dtype.itemsize * (not freeze_A))
    frozen = nn.Linear(K, N).requires_grad_(False)

    def frozen_forward():
        with torch.autocast("cpu", torch.bfloat16):
            frozen(x)

    assert saved_bytes(frozen_forward, exclude=frozen) >= N * K * 2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("freeze_A", [False, True])
def test_layers_on_one_input_share_it(freeze_A, dropout):
    modules = nn.ModuleList(layer(freeze_A=freeze_A, lora_dropout=dropout) for _ in range(3))
    x = torch.randn(2, M // 2, K, requires_grad=True)
    expected = M * (K * (not freeze_A) + 3 * R) * 4 + 3 * SEED * (dropout > 0)
    assert saved_bytes(lambda: [module(x) for module in modules], exclude=modules) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("freeze_A", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_layer_on_a_gpu(dtype, freeze_A, dropout):
    module = LoRALinear(1024, 768, r=16, freeze_A=freeze_A, lora_dropout=dropout, dtype=dtype, device="cuda")
    x = torch.randn(2048, 1024, dtype=dtype, device="cuda", requires_grad=True)
    expected = 2048 * (1024 * (not freeze_A) + 16) * dtype.itemsize + SEED * (dropout > 0)
    assert saved_bytes(lambda: module(x), exclude=module) == expected


def test_nothing_is_kept_where_no_gradient_flows():
    module = layer(lora_dropout=0.1)
    with torch.no_grad():
        assert saved_bytes(lambda: module(torch.randn(M, K)), exclude=module) == 0


# A toy Llama in bf16: 4 layers of width 512, 1024 tokens, r = 16 beside all 7 linear layers of each.
TOKENS, WIDTH, MLP, LAYERS, LINEARS, INPUTS, RANK = 1024, 512, 1408, 4, 7, 4, 16


def llama(config: LoRAConfig | None) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).to(torch.bfloat16)
    model.train().requires_grad_(False)
    if config is not None:
        inject(model, config)
    return model


def saved_by_llama(config: LoRAConfig | None) -> int:
    return saved_by(llama(config))


def saved_by(model: nn.Module) -> int:
    x = torch.randn(4, TOKENS // 4, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    return saved_bytes(lambda: model(inputs_embeds=x), exclude=model)


@pytest.fixture(scope="module")
def frozen_llama() -> int:
    return saved_by_llama(None)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("freeze_A", [False, True])
def test_llama_over_the_frozen_model(frozen_llama, freeze_A, adapter_dtype, dropout):
    config = LoRAConfig(
        r=RANK, target_modules="all-linear", freeze_A=freeze_A, adapter_dtype=adapter_dtype, lora_dropout=dropout
    )
    over = saved_by_llama(config) - frozen_llama
    # q/k/v share one input, gate/up one, down has its own; o_proj's is alive anyway.
    inputs = 0 if freeze_A else TOKENS * (WIDTH + WIDTH + MLP)
    low_rank = LINEARS * TOKENS * RANK
    assert over == LAYERS * ((inputs + low_rank) * 2 + INPUTS * SEED * (dropout > 0))
    assert over <= (0.9 if freeze_A else 20) * MIB


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("resample", ["never", "epoch"])
def test_llama_with_half_of_the_features_over_the_frozen_model(frozen_llama, resample, dropout):
    config = LoRAConfig(r=RANK, target_modules="all-linear", lora_dropout=dropout)
    whole = saved_by_llama(config) - frozen_llama
    half = saved_by_llama(replace(config, partial=PartialConfig(resample=resample))) - frozen_llama
    # Half of each input's columns, which the layers on it share; o_proj's input is alive anyway, a copy of half is not.
    inputs, low_rank = TOKENS * (WIDTH + WIDTH + MLP) // 2, LINEARS * TOKENS * RANK
    assert half == LAYERS * ((inputs + low_rank) * 2 + INPUTS * SEED * (dropout > 0))
    assert half <= 0.6 * whole


@pytest.mark.parametrize("kind", ["frozen", "LoRA-FA", "LoRA with dropout"])
def test_llama_that_recomputes_its_mlps(frozen_llama, kind):
    adapted, trains_A, dropout = kind != "frozen", kind == "LoRA with dropout", 0.05 * (kind == "LoRA with dropout")
    config = LoRAConfig(r=RANK, target_modules="all-linear", freeze_A=not trains_A, lora_dropout=dropout)
    model = llama(config if adapted else None)
    inputs, low_rank = TOKENS * 2 * WIDTH * trains_A, LINEARS * TOKENS * RANK * adapted
    # Of gate, act(gate) and up the first and the last stay; down's input never does.
    recompute_mlp(model, "activation")
    activation = saved_by(model)
    over = -TOKENS * MLP + inputs + low_rank
    assert activation - frozen_llama == LAYERS * (over * 2 + INPUTS * SEED * trains_A)
    # x stays, and nothing else of what gate and up keep.
    recompute_mlp(model, "full")
    full = saved_by(model)
    over = -3 * TOKENS * MLP + (inputs or TOKENS * WIDTH) + low_rank - 2 * TOKENS * RANK * adapted
    assert full - frozen_llama == LAYERS * (over * 2 + (INPUTS - 1) * SEED * trains_A)
    if kind == "LoRA-FA":
        assert activation <= 0.86 * frozen_llama
        assert full <= 0.62 * frozen_llama


class TestSavedBytes:
    def test_a_storage_counts_once_and_whole(self):
        x, w = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8)
        assert saved_bytes(lambda: (x[:2] * w[:2], x[2:4] * w[2:4])) == 8 * 8 * 4

    def test_excluded_tensors_do_not_count(self):
        x, w = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
        assert saved_bytes(lambda: x * w) == 2 * 8 * 8 * 4
        assert saved_bytes(lambda: x * w, exclude=w) == 8 * 8 * 4
        assert saved_bytes(lambda: x * w, exclude=[w, x.view(-1)]) == 0

    def test_it_takes_meta_tensors(self):
        x, w = (torch.randn(8, 8, device="meta", requires_grad=True) for _ in range(2))
        assert saved_bytes(lambda: x * w, exclude=w) == 8 * 8 * 4

"""Small layers quantised by bitsandbytes and torchao, and the weights they stand for."""

import copy
from functools import partial as part

import pytest
import torch
from torch import Tensor, nn

from lorasp import LoRAConfig

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

M, K, N, R = 10, 128, 96, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = LoRAConfig(r=R, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
LINEAR = nn.Linear(K, N)


def with_weight(layer: nn.Module, linear: nn.Linear) -> nn.Module:
    """layer with linear's parameters, quantised as moving it to its device does."""
    layer.load_state_dict(linear.state_dict())
    return layer.requires_grad_(False).to("cpu")


def four_bit(linear: nn.Linear, **options) -> nn.Module:
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    return with_weight(bnb.nn.Linear4bit(*sizes, **options).to(linear.weight.dtype), linear)


def eight_bit(linear: nn.Linear, **options) -> nn.Module:
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    return with_weight(bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, **options), linear)


def weight_only(linear: nn.Linear, config=torchao.Int8WeightOnlyConfig, **options) -> nn.Module:
    linear = copy.deepcopy(linear).requires_grad_(False)
    torchao.quantize_(linear, config(set_inductor_config=False, **options))
    return linear


KINDS = {
    "nf4": part(four_bit, quant_type="nf4"),
    "nf4 flat": part(four_bit, quant_type="nf4", compress_statistics=False),
    "fp4 bf16": part(four_bit, quant_type="fp4", compute_dtype=torch.bfloat16),
    "int8": eight_bit,
    "int8 outliers": part(eight_bit, threshold=1.0),
    "torchao": weight_only,
    "torchao groups": part(weight_only, granularity=torchao.PerGroup(32)),
}


def quantised(kind: str, dtype: torch.dtype = torch.float32, sizes: tuple[int, int] = (K, N)) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind](nn.Linear(*sizes, dtype=dtype))


def dequantised(layer: nn.Module) -> Tensor:
    """W (N, K) in fp32 as the codes say, by the libraries' own functions."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.view(-1, 1), layer.weight.quant_state).float()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return bnb.functional.int8_vectorwise_dequant(layer.weight.data, scales).float()
    return layer.weight.dequantize(torch.float32)

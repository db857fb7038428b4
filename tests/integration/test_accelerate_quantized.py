"""accelerate() on PEFT's layers over quantised weights: PEFT's function, LoRA-FA's bytes, several adapters, restore."""

import copy
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from quantized_layers import K, M, N, R, dequantised, quantised
from torch import Tensor, nn

from lorasp import LoRAConfig, accelerate, inject, restore, testing
from lorasp.integrations.peft_linear import FusedLayer
from lorasp.layers.quantized import frozen_tensors
from lorasp.memory import saved_bytes
from lorasp.ops import lora_update

HALF = torch.bfloat16
# What PEFT knows a model with such layers by.
MARKS = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit", "torchao": "is_quantized"}


class Net(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(kind: str, dtype: torch.dtype = HALF, layer: nn.Module | None = None, **config) -> PeftModel:
    model = Net(quantised(kind, dtype) if layer is None else layer)
    if layer is None:
        setattr(model, MARKS[kind], True)
    config = {"r": R, "lora_alpha": 7, "target_modules": ["layer"], "init_lora_weights": False} | config
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass.*")
        model = get_peft_model(model, LoraConfig(**config))
        model.add_adapter("other", LoraConfig(**config | {"r": 2, "use_rslora": True}))
    return model


def twin(model: PeftModel, kind: str, dtype: torch.dtype) -> PeftModel:
    """PEFT over the weight that the codes stand for, with the same adapters."""
    plain, base = nn.Linear(K, N, dtype=dtype), model.base_model.model.layer.base_layer
    with torch.no_grad():
        plain.weight.copy_(dequantised(base))
        plain.bias.copy_(base.bias)
    other = adapted(kind, dtype, plain).to(dtype)
    factors = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    other.load_state_dict(factors, strict=False)
    return other


def run(model: PeftModel, active: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
    layer = model.base_model.model.layer
    layer.set_adapter(active)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn((2, M // 2, K), generator=generator).to(HALF).to(dtype).requires_grad_()
    dy = torch.randn((2, M // 2, N), generator=generator).to(HALF).to(dtype)
    y = model(x)
    training = {name: p for name, p in layer.named_parameters() if "lora_" in name and p.requires_grad}
    return {"y": y.detach()} | dict(
        zip(("x", *training), torch.autograd.grad(y, [x, *training.values()], dy), strict=True)
    )


@pytest.fixture
def updates(monkeypatch) -> list[int]:
    """The rank of every low-rank update that runs."""
    ranks = []
    for backend, op in list(lora_update.forward_ops.items()):
        monkeypatch.setitem(
            lora_update.forward_ops, backend, lambda y, x, A, *a, op=op: (ranks.append(len(A)), op(y, x, A, *a))[1]
        )
    return ranks


@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other"]], ids="+".join)
@pytest.mark.parametrize("kind", MARKS)
def test_a_layer_computes_what_it_computed(kind, active, updates):
    model = adapted(kind).train()
    exact, reference = (run(twin(model, kind, dtype), active, dtype) for dtype in (torch.float64, HALF))
    report = accelerate(model)
    assert report.accelerated == ("base_model.model.layer",)
    actual = run(model, active, HALF)
    assert updates == [{"default": R, "other": 2}[name] for name in active]
    assert actual.keys() == exact.keys()
    for name, tensor in actual.items():
        testing.assert_close(tensor, reference[name], exact[name], HALF, name)


@pytest.mark.parametrize("kind", MARKS)
def test_a_frozen_A_keeps_x_At_alone_whatever_peft_toggles(kind):
    model = adapted(kind, lora_dropout=0.1).train()
    assert accelerate(model, freeze_A=True).frozen_A.keys() == {"default", "other"}
    with model.disable_adapter():
        pass
    model.set_adapter("other")
    model.set_adapter("default")
    layer, x = model.base_model.model.layer, torch.randn(M, K, dtype=HALF, requires_grad=True)
    assert not layer.lora_A["default"].weight.requires_grad
    assert saved_bytes(lambda: model(x), exclude=(model, *frozen_tensors(layer.base_layer))) == M * R * 2 + 8


@pytest.mark.parametrize("kind", MARKS)
def test_what_is_peft_s_stays_peft_s(kind, updates):
    """Switched off, hooked, restored, copied: PEFT's forward, or the same one again."""
    model, x = adapted(kind).eval(), torch.randn(M, K, dtype=HALF, requires_grad=True)
    layer = model.base_model.model.layer
    own, expected, names = type(layer), model(x), list(model.state_dict())
    accelerate(model)
    fused = model(x)
    assert updates.pop() == R
    assert isinstance(layer, own)
    assert isinstance(layer, FusedLayer)
    assert list(model.state_dict()) == names
    with model.disable_adapter():
        assert torch.equal(model(x), layer.base_layer(x))
    handle = layer.lora_A["default"].register_forward_hook(lambda *_: None)
    assert torch.equal(model(x), expected)
    handle.remove()
    assert not updates
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))) if kind != "torchao" else ():
        assert torch.equal(same(x), fused)
        assert updates.pop() == R
    with pytest.raises(ValueError, match="carries PEFT's own layers"):
        inject(model.base_model.model, LoRAConfig(target_modules="all-linear"))
    restore(model)
    assert type(layer) is own
    assert torch.equal(model(x), expected)
    assert not updates

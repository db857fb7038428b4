"""Nothing in a step waits for the device, so a CUDA graph can hold it: steps run here on tensors that hold no data.

A fake tensor raises where Python asks for a value (item, bool, equal) or for a size that depends on one (nonzero). That
covers everything up to the raw operators; behind them, the launchers of lorasp.triton_kernels run on meta tensors in
test_triton_compile.
"""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

import lorasp
from lorasp import LoRALinear, PartialConfig, SharedInput, triton_kernels
from lorasp.layers import shared_input
from lorasp.ops import registry

K, N, R = 24, 20, 4
PARTS = [PartialConfig(granularity=name) for name in ("feature", "element", "rank")]
PARTS += [PartialConfig(granularity=name, resample="epoch") for name in ("feature", "element", "matrix")]
ADAPTERS = [{}, {"freeze_A": True}, {"adapter_dtype": torch.float32}, *({"partial": partial} for partial in PARTS)]
IDS = ["LoRA", "LoRA-FA", "masters", *(f"{part.granularity}-{part.resample}" for part in PARTS)]


@pytest.fixture(params=["reference", "triton"])
def fake(request, monkeypatch):
    """The mode that makes fake tensors, with a backend of GPUs forced: its operators' shapes, nothing behind them."""
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(registry, "_triton_interpreted", True)
    with lorasp.use_backend(request.param):
        yield FakeTensorMode()


def layer_of(mode: FakeTensorMode, dtype=torch.float16, **adapter) -> LoRALinear:
    """A layer whose data is taken away once it is made: drawing a selection takes data."""
    layer = LoRALinear(K, N, r=R, lora_dropout=0.1, dtype=dtype, **adapter)
    for name, adapter in layer.adapters.items():
        adapter.share(f"layers of {name}") if hasattr(adapter, "share") else None
    for part in layer.modules():
        for name, parameter in part._parameters.items():
            value = mode.from_tensor(parameter.detach())
            part.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else mode.from_tensor(buffer)
    return layer


def x_of(dtype=torch.float16) -> torch.Tensor:
    return torch.empty(2, 3, K, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=IDS)
def test_a_layer(fake, adapter):
    layer = layer_of(fake, **adapter)
    with fake:
        for _ in range(2):  # the second call takes the checked path
            layer(x_of()).sum().backward()


@pytest.mark.parametrize("adapter", ADAPTERS, ids=IDS)
def test_layers_on_one_input(fake, adapter, monkeypatch):
    layers = [layer_of(fake, **adapter) for _ in range(3)]
    group, together = SharedInput(layers), []
    monkeypatch.setattr(shared_input, "_PLAIN", (FakeTensor,))
    compute = group._compute
    monkeypatch.setattr(group, "_compute", lambda *a: together.append(len(a[1])) or compute(*a))
    with fake:
        for _ in range(2):
            x = x_of()
            sum(layer(x).sum() for layer in layers).backward()
    assert together == [3, 3]


@pytest.mark.parametrize("pattern", ["column", "element", "span"])
def test_hiddenkeys_operators(fake, pattern):
    with fake:
        q, k, v = (torch.empty(2, heads, 6, 16, dtype=torch.float16, requires_grad=True) for heads in (4, 2, 2))
        mask = torch.empty(2, 1, 1, 6, dtype=torch.bool)
        o = lorasp.dropkey_attention(q, k, v, mask, dropout_p=0.3, pattern=pattern, enable_gqa=True).flatten(2)
        lorasp.hidden_cut(o, 0.3, pattern=pattern, residual=torch.empty_like(o)).sum().backward()


@pytest.mark.parametrize("kind", ["kl", "js"])
def test_consistency(fake, kind):
    with fake:
        logits, other = torch.empty(2, 6, 40, requires_grad=True), torch.empty(2, 6, 40, requires_grad=kind == "kl")
        lorasp.consistency_loss(logits, other, kind=kind, mask=torch.empty(2, 6, dtype=torch.bool)).backward()


@pytest.mark.parametrize("adapter", ADAPTERS, ids=IDS)
def test_partial_adamw(fake, adapter):
    layer = layer_of(fake, **adapter)
    optimizer = lorasp.PartialAdamW(layer)
    with fake:
        for _ in range(2):
            layer(x_of()).sum().backward()
            optimizer.step()


def test_a_wait_would_be_found(fake):
    with fake:
        for wait in (torch.Tensor.item, torch.Tensor.__bool__, lambda x: torch.equal(x, x)):
            with pytest.raises(DataDependentOutputException):
                wait(torch.empty(()))
        with pytest.raises(DynamicOutputShapeException):
            torch.empty(3).nonzero()


# What forward, backward and launchers consist of.
HOT = ("ops", "functional", "reference", "rng.py", "adapter/adapter.py", "layers")
WAITS = {"item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "equal", "allclose", "unique", "synchronize"}


def test_no_code_of_a_step_asks_for_a_value():
    """Where no test above leads, either: calls by name, on any object."""
    root = Path(lorasp.__file__).parent
    places = [root / place for place in HOT] + [Path(triton_kernels.__file__).parent]
    files = [file for place in places for file in ([place] if place.suffix else place.glob("*.py"))]
    assert len(files) > 40
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
            if called in WAITS:
                found.append(f"{file.name}:{node.lineno} {called}")
    assert not found

"""What layers and groups check is checked once: after a change they do what fresh ones do."""

import pytest
import torch
from shared_blocks import Block, K
from torch import nn

import lorasp
from lorasp import LoRALinear, PartialConfig
from lorasp.ops import registry

N, R = 6, 3


def layer(**arguments):
    torch.manual_seed(0)
    return nn.ModuleList([LoRALinear(K, N, r=R, init_lora_weights=False, **arguments)])


MODULES = {
    "layer": layer,
    "LoRA-SP layer": lambda: layer(partial=PartialConfig()),
    "group": Block,
    "LoRA-SP group": lambda: Block(partial=PartialConfig()),
}


def first(module):
    return module[0]


def adapter(module):
    return first(module).adapters["default"]


def trained(module):
    return list(adapter(module).parameters())


def replaced(parameter, data):
    parameter.data = data


def set_dropout(module, p):
    for one in getattr(module, "layers", module):
        one.adapters["default"].lora_dropout = p


# Name -> (what changes in the module, what its input becomes).
CHANGES = {
    "nothing": (lambda m: None, lambda x: x),
    "more rows": (lambda m: None, lambda x: torch.cat([x, x])),
    "features of x": (lambda m: None, lambda x: x[..., : K - 1]),
    "dtype of x": (lambda m: None, lambda x: x.double()),
    "no dimension of x": (lambda m: None, lambda x: x.sum()),
    "no tensor": (lambda m: None, lambda x: x.numpy()),
    "scale": (lambda m: setattr(adapter(m), "scale", 7.0), lambda x: x),
    "bad scale": (lambda m: setattr(adapter(m), "scale", float("nan")), lambda x: x),
    "bad dropout": (lambda m: set_dropout(m, 2.0), lambda x: x),
    "weight's shape": (lambda m: replaced(first(m).weight, torch.zeros(8, K - 1)), lambda x: x),
    "weight's dtype": (lambda m: replaced(first(m).weight, first(m).weight.double()), lambda x: x),
    "bias's shape": (lambda m: replaced(first(m).bias, torch.zeros(1)), lambda x: x),
    "A's dtype": (lambda m: replaced(trained(m)[0], trained(m)[0].double()), lambda x: x),
    "B's dtype": (lambda m: replaced(trained(m)[1], trained(m)[1].double()), lambda x: x),
    "B's shape": (lambda m: replaced(trained(m)[1], torch.zeros(1, R + 9)), lambda x: x),
    "A's device": (lambda m: adapter(m).to("meta"), lambda x: x),
}


def outcome(module, x):
    """What module computes for every member, or how it refuses."""
    try:
        with torch.no_grad():
            return [one(x) for one in getattr(module, "layers", module)]
    except (TypeError, ValueError) as error:
        return [f"{type(error).__name__}: {error}"]


def used_and_fresh(make, x):
    used = make()
    for _ in range(2):
        outcome(used, x.clone())
    assert _checked(used)[0] is not None
    return used, make()


def _checked(module):
    one = first(module)
    return (one.shared_input or one)._checked


def assert_same(used, fresh):
    assert len(used) == len(fresh)
    for have, want in zip(used, fresh, strict=True):
        assert torch.equal(have, want) if isinstance(want, torch.Tensor) else have == want, want


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", MODULES)
def test_a_change_is_noticed(kind, change):
    x, (alter, turn) = torch.randn(2, 3, K), CHANGES[change]
    used, fresh = used_and_fresh(MODULES[kind], x)
    for module in (used, fresh):
        alter(module)
    assert_same(outcome(used, turn(x.clone())), outcome(fresh, turn(x.clone())))


@pytest.mark.parametrize("kind", ["LoRA-SP layer", "LoRA-SP group"])
@pytest.mark.parametrize("part", ["frozen_A", "columns"])
def test_a_part_in_another_dtype_is_noticed(kind, part):
    x = torch.randn(2, 3, K)
    used, fresh = used_and_fresh(MODULES[kind], x)
    for module in (used, fresh):
        operands = type(first(module))._operands

        def altered(layer, operands=operands):
            found = operands(layer)
            return found._replace(**{part: getattr(found, part).to(torch.float64)})

        first(module)._operands = altered.__get__(first(module))
    (refusal,) = outcome(fresh, x.clone())
    assert "must have dtype" in refusal or "must be" in refusal
    assert_same(outcome(used, x.clone()), [refusal])


@pytest.mark.parametrize("kind", MODULES)
def test_surroundings_are_noticed(kind):
    x = torch.randn(2, 3, K)
    used, fresh = used_and_fresh(MODULES[kind], x)
    with lorasp.use_backend("reference", "fused"):
        assert_same(outcome(used, x.clone()), outcome(fresh, x.clone()))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = outcome(used, x.clone()), outcome(fresh, x.clone())
    assert all(y.dtype == torch.bfloat16 for y in ours)
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", MODULES)
def test_it_is_noticed_that_a_gpu_would_wait(kind, monkeypatch):
    """The same layer serves few rows by another backend than many."""
    choose = registry.choose

    def refusing(operator, device_type, dtype, waits=False):
        if waits:
            raise ValueError("few rows go elsewhere")
        return choose(operator, device_type, dtype)

    monkeypatch.setattr(registry, "choose", refusing)
    monkeypatch.setattr(registry, "waits_for_host", lambda x, out_features, plan: x.numel() <= K)
    used, _ = used_and_fresh(MODULES[kind], torch.randn(2, 3, K))
    assert outcome(used, torch.randn(1, K)) == ["ValueError: few rows go elsewhere"]


@pytest.mark.parametrize("kind", [*MODULES, "one of a group with dropout"])
def test_every_output_may_be_written_to(kind):
    make = MODULES.get(kind, lambda: Block(lora_dropout=0.1).layers[1:2])
    module, x = make(), torch.randn(2, 3, K)
    for _ in range(4):
        for one in getattr(module, "layers", module):
            one(x).add_(1.0).sum().backward()

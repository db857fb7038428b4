"""LoRAFAAdamW on whole models: what it steps, saves, copies, shards and refuses."""

import copy
import io
from itertools import pairwise

import pytest
import torch
from lorafa_layers import K, N, Net, R, changed, factor_B, frozen, same, train, values
from torch import nn

from lorasp import LoRAFAAdamW, LoRALinear, PartialAdamW, PartialConfig


def test_everything_but_B_is_stepped_by_adamw():
    ours, plain = Net(), Net()
    before, hyper = values(ours), {"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.1}
    train(ours, LoRAFAAdamW(ours, **hyper), 1)
    train(plain, PartialAdamW(plain, **hyper), 1)
    factors = {f"{name}.adapters.default.lora_B" for name in ("first", "second")}
    assert changed(values(plain), ours) == factors
    assert changed(before, ours) == factors | {"first.bias", "second.bias", "head.weight", "head.bias"}


def test_B_beside_an_A_that_trains_is_stepped_by_adamw():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(frozen(), LoRALinear(N, K, r=R, init_lora_weights=False))

    ours, plain = model(), model()
    train(ours, LoRAFAAdamW(ours, lr=1e-2), 1)
    train(plain, PartialAdamW(plain, lr=1e-2, eps=1e-6, weight_decay=0.0), 1)
    assert changed(values(plain), ours) == {"0.adapters.default.lora_B"}


@pytest.mark.parametrize(
    "partial", [None, PartialConfig(), PartialConfig(resample=3)], ids=["all", "packed", "resampled"]
)
def test_training_goes_on_after_save_and_load(partial):
    model = Net(partial=partial)
    optimizer = LoRAFAAdamW(model, lr=1e-2, weight_decay=0.1)
    train(model, optimizer, 4)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file := io.BytesIO())
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    fresh = Net(partial=partial)
    with torch.no_grad():
        fresh.first.set_lora(torch.zeros(R, K), torch.zeros(32, R))
    other = LoRAFAAdamW(fresh, lr=1.0)
    fresh.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for one, its in ((model, optimizer), (fresh, other)):
        train(one, its, 4, seed=4)
    assert same(model, fresh)


def test_a_copy_of_model_and_optimizer_trains_like_them():
    model = Net()
    optimizer = LoRAFAAdamW(model, lr=1e-2)
    train(model, optimizer, 2)
    twin, its = copy.deepcopy((model, optimizer))
    for one, own in ((model, optimizer), (twin, its)):
        train(one, own, 2, seed=1)
    assert same(model, twin)
    before = values(model)
    train(twin, its, 1)
    assert not changed(before, model)


def test_param_groups_and_schedulers():
    model = Net()
    groups = [
        {"params": [model.first.adapters.default.lora_B], "lr": 0.0, "weight_decay": 0.5},
        {"params": [model.second.adapters.default.lora_B, *model.head.parameters()]},
    ]
    optimizer = LoRAFAAdamW(model, groups, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2))
    history = [values(model)]
    for seed in range(3):
        train(model, optimizer, 1, seed)
        scheduler.step()
        history.append(values(model))
    moved = {"second.adapters.default.lora_B", "head.weight", "head.bias"}
    changes = [{name for name in old if not torch.equal(old[name], new[name])} for old, new in pairwise(history)]
    assert changes == [moved, moved, set()]


def test_a_parameter_without_a_gradient_is_left_alone():
    model = Net()
    optimizer, before = LoRAFAAdamW(model, lr=1e-2, weight_decay=0.1), values(model)
    model(torch.randn(4, K)).sum().backward()
    skipped = model.first.adapters.default.lora_B
    skipped.grad = None
    optimizer.step()
    assert "first.adapters.default.lora_B" not in changed(before, model)
    assert "second.adapters.default.lora_B" in changed(before, model)
    assert skipped not in optimizer.state


def test_a_closure_is_called_with_gradients_on():
    model = Net()
    optimizer, before, x = LoRAFAAdamW(model), values(model), torch.randn(4, K)

    def closure():
        optimizer.zero_grad()
        value = model(x).square().mean()
        value.backward()
        return value

    expected = model(x).square().mean().detach()
    assert torch.equal(optimizer.step(closure), expected)
    assert changed(before, model)


def test_a_sharded_B(process_group):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DeviceMesh

    plain, sharded = Net(), Net()
    fully_shard(sharded, mesh=DeviceMesh("cpu", [0]))
    for model in (plain, sharded):
        train(model, LoRAFAAdamW(model, lr=1e-2), 3)
    assert hasattr(factor_B(sharded.first), "placements")
    for name, value in sharded.named_parameters():
        assert torch.equal(value.full_tensor(), plain.get_parameter(name)), name


def test_a_B_sharded_across_its_columns_is_refused(process_group):
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    layer = frozen()
    spread = distribute_tensor(factor_B(layer).detach(), DeviceMesh("cpu", [0]), [Shard(1)])
    layer.adapters.default.lora_B = nn.Parameter(spread)
    with pytest.raises(ValueError, match=r"LoRAFAAdamW: lora_B must be sharded by whole rows, got S"):
        LoRAFAAdamW(layer)


@pytest.mark.parametrize(
    ("model", "arguments", "kind", "message"),
    [
        (lambda: [nn.Parameter(torch.zeros(2))], {}, TypeError, "model must be an nn.Module, got list"),
        (lambda: LoRALinear(K, N), {}, ValueError, r"params must hold a lora_B .* \(freeze_A=True\), got none"),
        (lambda: nn.Linear(K, N), {}, ValueError, "params must hold a lora_B whose lora_A is frozen"),
        (frozen, {"params": [nn.Parameter(torch.zeros(2))]}, ValueError, "params must hold a lora_B"),
        (
            lambda: frozen(partial=PartialConfig(granularity="element")), {}, ValueError,
            "granularity must be 'feature', 'rank' or 'matrix' where A is frozen, got 'element'",
        ),
        (frozen, {"lr": -1.0}, ValueError, "lr must be a finite number >= 0, got -1.0"),
        (frozen, {"betas": (0.9,)}, ValueError, r"betas must be two numbers in \[0, 1\), got \(0.9,\)"),
    ],
)  # fmt: skip
def test_refused(model, arguments, kind, message):
    with pytest.raises(kind, match=f"LoRAFAAdamW: {message}"):
        LoRAFAAdamW(model(), **arguments)

"""LoRAFAAdamW: the correction of LoRA-FA's gradient, its cache, and AdamW for everything else."""

import copy
import io
import math
from itertools import pairwise

import pytest
import torch
from partial_oracle import batches, loss
from torch import Tensor, nn

from lorasp import LoRAConfig, LoRAFAAdamW, LoRALinear, PartialAdamW, PartialConfig, inject, testing
from lorasp.adapter.adapter import Adapter

K, N, R = 40, 24, 4
DELTA = 1e-8
SELECTIONS = {
    "all": None,
    "packed rows": PartialConfig(),
    "resampled rows": PartialConfig(resample=7),
    "packed ranks": PartialConfig(granularity="rank"),
    "resampled ranks": PartialConfig(granularity="rank", resample=7),
}


def frozen(**arguments) -> LoRALinear:
    torch.manual_seed(0)
    return LoRALinear(K, N, **({"r": R, "lora_alpha": 3 * R, "freeze_A": True, "init_lora_weights": False} | arguments))


def factor_B(layer: nn.Module) -> nn.Parameter:
    (parameter,) = layer.adapters[layer.active_adapter].parameters()
    return parameter


def backward(layer: LoRALinear, rows: int = 16) -> Tensor:
    """Give the layer gradients; returns that of its whole weight, in fp64."""
    ((x, target),) = batches(1, rows, layer, layer.weight.dtype)
    loss(layer(x), target).backward()
    twin = copy.deepcopy(layer).double().requires_grad_(True)
    twin.zero_grad()
    loss(twin(x.double()), target.double()).backward()
    return twin.weight.grad


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(16, K, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def corrected(layer: LoRALinear, **arguments) -> Tensor:
    """What the optimizer takes for the gradient of B, dense (N, R): the first moment after one step with beta1 = 0."""
    lora_B = factor_B(layer)
    optimizer = LoRAFAAdamW(layer, betas=(0.0, 0.999), lr=0.0, **arguments)
    optimizer.step()
    grad, mask = optimizer.state[lora_B]["exp_avg"], layer.trainable_mask_B()
    dense = torch.zeros(mask.shape, dtype=grad.dtype)
    return grad if grad.shape == mask.shape else dense.masked_scatter_(mask, grad)


def projected(G: Tensor, A: Tensor) -> Tensor:
    """G P, P the projector on the space of A's rows."""
    basis = torch.linalg.qr(A.t()).Q
    return G @ basis @ basis.t()


def reachable(layer: LoRALinear, G: Tensor, dtype: torch.dtype) -> Tensor:
    """G projected on the changes of the weight that what trains of B can make."""
    G, mask = G.to(dtype), layer.trainable_mask_B()
    met = mask.any(0)
    return projected(G, layer.lora_A.detach()[met].to(dtype)) * mask.any(1, keepdim=True)


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_corrected_gradient_is_the_weights_gradient_projected(selection, rank_stabilised):
    layer = frozen(partial=SELECTIONS[selection], use_rslora=rank_stabilised)
    G = backward(layer)
    change = layer.scale * corrected(layer) @ layer.lora_A
    expected = [reachable(layer, G, dtype) for dtype in (torch.float32, torch.float64)]
    testing.assert_close(change, *expected, torch.float32, selection)
    assert (selection == "all") == bool(layer.trainable_mask_B().all())


def test_a_small_A_is_regularised():
    layer = frozen()
    layer.lora_A.mul_(1e-4)
    G, s = backward(layer), layer.scale

    def formula(dtype, delta=DELTA):
        A = layer.lora_A.to(dtype)
        gram = A @ A.t() + delta * torch.eye(R, dtype=dtype)
        return torch.linalg.solve(gram, (s * G.to(dtype) @ A.t()).t()).t() / s**2

    single, double = formula(torch.float32), formula(torch.float64)
    testing.assert_close(corrected(layer), single, double, torch.float32)
    assert testing.error(formula(torch.float64, delta=0), double) > testing.bound(single, double, torch.float32)


def test_no_other_change_of_B_comes_nearer_to_the_weights_gradient():
    layer = frozen(dtype=torch.float64)
    G, A, s = backward(layer), layer.lora_A, layer.scale
    best = corrected(layer)

    def distance(change):
        return (s * change @ A - G).norm()

    for _ in range(5):
        assert distance(best + 1e-3 * best.norm() * torch.randn(N, R, dtype=torch.float64)) > distance(best)
    assert distance(factor_B(layer).grad) > distance(best)


def test_rows_of_A_that_depend_on_each_other():
    layer = frozen()
    layer.lora_A[3] = layer.lora_A[0] - layer.lora_A[1]
    G = backward(layer)
    change = layer.scale * corrected(layer) @ layer.lora_A
    expected = [projected(G.to(dtype), layer.lora_A[:3].to(dtype)) for dtype in (torch.float32, torch.float64)]
    testing.assert_close(change, *expected, torch.float32)


@pytest.mark.parametrize("masters", [torch.float32, None])
def test_half_precision(masters):
    layer = frozen(dtype=torch.bfloat16, adapter_dtype=masters)
    backward(layer)
    lora_B, A, s = factor_B(layer), layer.lora_A, layer.scale
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        inverse = torch.linalg.inv(A.to(wide) @ A.to(wide).t() + DELTA * torch.eye(R, dtype=wide))
        results.append((lora_B.grad.to(wide) @ inverse / s**2).to(masters or dtype))
    with torch.autocast("cpu", torch.bfloat16):
        change = corrected(layer)
    assert change.dtype == (masters or torch.bfloat16)
    testing.assert_close(change, *results[:1], results[1].double(), masters or torch.bfloat16)


def test_packed_rows_are_stepped_as_the_same_rows_of_a_dense_adapter():
    packed, dense = frozen(partial=PartialConfig()), frozen()
    dense.load_state_dict({**dense.state_dict(), "weight": packed.weight, "bias": packed.bias})
    dense.set_lora(packed.lora_A, packed.lora_B)
    rows = packed.adapters.default.rows
    for layer in (packed, dense):
        backward(layer)
    assert torch.equal(packed.adapters.default.lora_B_packed, dense.lora_B[rows])
    factor_B(dense).grad[rows] = factor_B(packed).grad
    for layer in (packed, dense):
        LoRAFAAdamW(layer, lr=1e-2).step()
    testing.assert_close(factor_B(packed), dense.lora_B[rows], dense.lora_B[rows].double(), torch.float32)
    assert not torch.equal(packed.lora_B, dense.lora_B)


class TestPeft:
    """PEFT's own optimizer on PEFT's own model, without the bf16 it computes the correction in."""

    def model(self, dtype: torch.dtype = torch.float32, **arguments) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(K, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8))
        config = LoraConfig(
            r=R, lora_alpha=3 * R, target_modules=["0", "2"], rank_pattern={"2": 6}, modules_to_save=["4"],
            init_lora_weights=False, **arguments,
        )  # fmt: skip
        model = get_peft_model(model, config).to(dtype)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        return model

    def trained(self, dtype: torch.dtype, monkeypatch) -> nn.Module:
        from peft.optimizers import create_lorafa_optimizer, lorafa

        monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
        model = self.model(dtype)
        optimizer = create_lorafa_optimizer(model, r=R, lora_alpha=3 * R, lr=1e-2)
        self.train(model, optimizer, dtype, theirs=True)
        return model

    def train(self, model, optimizer, dtype, theirs=False) -> None:
        generator = torch.Generator().manual_seed(1)
        for step in range(1, 4):
            model(torch.randn(16, K, generator=generator).to(dtype)).square().mean().backward()
            if theirs:  # they add eps before the bias correction of the second moment, AdamW's definition after it
                optimizer.param_groups[0]["eps"] = 1e-6 * math.sqrt(1 - 0.999**step)
            optimizer.step()
            optimizer.zero_grad()

    def test_the_same_three_steps(self, monkeypatch):
        ours = self.model()
        before = {name: value.clone() for name, value in ours.named_parameters()}
        self.train(ours, LoRAFAAdamW(ours, lr=1e-2), torch.float32)
        theirs, exact = (self.trained(dtype, monkeypatch) for dtype in (torch.float32, torch.float64))
        compared = list(zip(ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True))
        for (name, value), *others in compared:
            testing.assert_close(value, *others, torch.float32, name)
        moved = {name for (name, value), *_ in compared if not torch.equal(value, before[name])}
        assert sum("lora_B" in name for name in moved) == 2
        assert sum("modules_to_save" in name for name in moved) == 2
        assert len(moved) == 4

    def test_dora_is_refused(self):
        with pytest.raises(ValueError, match="LoRAFAAdamW: adapters must be plain LoRA, got DoRA in adapter 'default'"):
            LoRAFAAdamW(self.model(use_dora=True))


class Net(nn.Module):
    """Two adapted layers and a head that trains whole."""

    def __init__(self, **arguments):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(K, 32), nn.Linear(32, 16), nn.Linear(16, 8)
        config = {"r": R, "target_modules": ["first", "second"], "freeze_A": True, "init_lora_weights": False}
        inject(self, LoRAConfig(**(config | {"modules_to_save": ["head"], "bias": "lora_only"} | arguments)))

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def same(one: nn.Module, other: nn.Module) -> bool:
    return not changed(values(one), other)


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


def test_the_gradient_itself_is_left_alone():
    layer = frozen()
    backward(layer)
    before = factor_B(layer).grad.clone()
    LoRAFAAdamW(layer).step()
    assert torch.equal(factor_B(layer).grad, before)


def test_any_number_of_adapters():
    layer = frozen()
    arguments = {"r": 7, "lora_alpha": 5, "lora_dropout": 0.0, "freeze_A": True, "use_rslora": True}
    second = Adapter(K, N, **arguments, init_lora_weights=False, device="cpu", dtype=torch.float32)
    optimizer = LoRAFAAdamW(layer, lr=1e-2)
    layer.adapters["second"] = second
    optimizer.add_param_group({"params": list(second.parameters()), "betas": (0.0, 0.999)})
    layer.active_adapter = "second"
    before, G = values(layer), backward(layer)
    optimizer.step()
    assert changed(before, layer) == {"adapters.second.lora_B"}
    assert set(optimizer.state) == {second.lora_B}
    change = layer.scale * optimizer.state[second.lora_B]["exp_avg"] @ second.lora_A
    expected = [projected(G.to(dtype), second.lora_A.to(dtype)) for dtype in (torch.float32, torch.float64)]
    testing.assert_close(change, *expected, torch.float32)


class TestInverse:
    @pytest.fixture
    def made(self, monkeypatch) -> list:
        made, pinv = [], torch.linalg.pinv
        monkeypatch.setattr(torch.linalg, "pinv", lambda gram, **how: made.append(gram.dtype) or pinv(gram, **how))
        return made

    def test_is_made_once_per_A(self, made):
        model = Net()
        train(model, LoRAFAAdamW(model), 5)
        assert made == [torch.float64] * 2

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.lora_A.mul_(2),
            lambda layer: layer.reset_lora_parameters(),
            lambda layer: layer.load_state_dict(frozen(r=R).state_dict()),
            lambda layer: layer.set_lora(torch.randn(R, K), layer.lora_B),
            lambda layer: setattr(layer.lora_A, "data", torch.randn(R, K)),
            lambda layer: setattr(layer.adapters.default, "lora_A", torch.randn(R, K)),
            lambda layer: setattr(layer.adapters.default, "scale", 0.5),
        ],
        ids=["in place", "reset", "load", "set_lora", "data", "another tensor", "scale"],
    )
    def test_follows(self, change, made):
        layer = frozen()
        optimizer = LoRAFAAdamW(layer, lr=0.0, betas=(0.0, 0.0))
        train(layer, optimizer, 1)
        with torch.no_grad():
            change(layer)
        G = backward(layer)
        optimizer.step()
        assert len(made) == 2
        change = layer.scale * optimizer.state[factor_B(layer)]["exp_avg"] @ layer.lora_A
        expected = [projected(G.to(dtype), layer.lora_A.to(dtype)) for dtype in (torch.float32, torch.float64)]
        testing.assert_close(change, *expected, torch.float32)

    def test_follows_a_selection_of_ranks(self, made):
        layer = frozen(partial=PartialConfig(granularity="rank", resample="epoch"))
        optimizer = LoRAFAAdamW(layer, lr=1e-2)
        train(layer, optimizer, 2)
        layer.adapters.default.resample()
        train(layer, optimizer, 2)
        assert len(made) == 2


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


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


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

"""LoRAFAAdamW: the weight's gradient projected on what a B beside a frozen A can change."""

import math

import pytest
import torch
from lorafa_layers import K, N, Net, R, backward, changed, factor_B, frozen, train, values
from torch import Tensor, nn

from lorasp import LoRAFAAdamW, LoRALinear, PartialConfig, testing
from lorasp.adapter.adapter import Adapter

DELTA = 1e-8
SELECTIONS = {
    "all": None,
    "packed rows": PartialConfig(),
    "resampled rows": PartialConfig(resample=7),
    "packed ranks": PartialConfig(granularity="rank"),
    "resampled ranks": PartialConfig(granularity="rank", resample=7),
}


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

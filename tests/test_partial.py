"""LoRA-SP: that only what is chosen trains, and that freezing half halves what it can."""

import pytest
import torch
from partial_layers import GRANULARITIES, RESAMPLES, WITH_FREEZE_A, K, N, R, layer_with_values, masks, trained
from partial_oracle import BETAS, EPS, WEIGHT_DECAY, Oracle, batches, loss
from tiny_model import Model

import lorasp
from lorasp import LoRAConfig, LoRALinear, PartialConfig, inject, testing
from lorasp.memory import saved_bytes
from lorasp.models.inject import report as inject_report


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize(("granularity", "freeze_A"), WITH_FREEZE_A)
@pytest.mark.parametrize(
    ("dtype", "masters"),
    [(torch.float64, None), (torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)],
)
def test_outputs_and_gradients_are_those_of_dense_lora_masked(dtype, masters, granularity, resample, freeze_A, dropout):
    layer = layer_with_values(
        granularity, resample, dtype=dtype, adapter_dtype=masters, freeze_A=freeze_A, lora_dropout=dropout
    )
    mask_A, mask_B = masks(layer)
    ((x, dy),) = batches(1, 9, layer, dtype)

    def dense(dtype, factors):
        leaves = [
            t.detach().to(d).requires_grad_() for t, d in ((x, dtype), (layer.lora_A, factors), (layer.lora_B, factors))
        ]
        torch.manual_seed(5)
        y = lorasp.lora_linear(
            leaves[0], layer.weight.to(dtype), leaves[1], leaves[2], layer.bias.to(dtype), scale=layer.scale,
            dropout_p=dropout,
        )  # fmt: skip
        return y, torch.autograd.grad(y, leaves, dy.to(dtype))

    with lorasp.use_backend("reference"):
        reference, grads = dense(dtype, masters or dtype)
        reference64, grads64 = dense(torch.float64, torch.float64)
    x.requires_grad_()
    torch.manual_seed(5)
    y = layer(x)
    y.backward(dy)
    testing.assert_close(y, reference, reference64, dtype, "y")
    testing.assert_close(x.grad, grads[0], grads64[0], dtype, "dx")
    adapter = layer.adapters.default
    for name, mask, grad, grad64 in (
        ("lora_A", mask_A, grads[1], grads64[1]),
        ("lora_B", mask_B, grads[2], grads64[2]),
    ):
        if hasattr(adapter, f"{name}_packed"):
            actual = getattr(adapter, f"{name}_packed").grad
            assert actual.dtype == (masters or dtype)
            testing.assert_close(actual.flatten(), grad[mask], grad64[mask], dtype, name)
        elif (actual := getattr(adapter, name).grad) is None:
            assert not mask.any()
        else:
            testing.assert_close(actual, grad * mask, grad64 * mask, dtype, name)
            assert not actual[~mask].any()


@pytest.mark.parametrize(("granularity", "freeze_A"), WITH_FREEZE_A)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_twenty_steps_of_adamw_are_those_of_dense_lora_with_everything_masked(dtype, granularity, freeze_A):
    layer = layer_with_values(granularity, dtype=dtype, freeze_A=freeze_A)
    oracle, oracle64 = Oracle(layer, dtype), Oracle(layer, torch.float64)
    mask_A, mask_B = masks(layer)
    first_A, first_B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    optimizer = torch.optim.AdamW(trained(layer), lr=1e-2, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    for x, target in batches(20, 32, layer, dtype):
        loss(layer(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        oracle64.step(x, target, mask_A, mask_B, 1e-2)
        # Rows in another order: what fp64's own rounding does to the plain computation.
        oracle.step(x.flip(0), target.flip(0), mask_A, mask_B, 1e-2)
    for name, first, mask, reference, reference64 in (
        ("lora_A", first_A, mask_A, oracle.A, oracle64.A),
        ("lora_B", first_B, mask_B, oracle.B, oracle64.B),
    ):
        last = getattr(layer, name)
        testing.assert_close(last, reference.value, reference64.value, dtype, name)
        assert torch.equal(last[~mask], first[~mask])
        assert not (last == first)[mask].any()


class TestCost:
    """Half of the entries: half of everything that can be halved."""

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_parameters_gradients_and_optimizer_state_halve(self, granularity):
        layer, (x, target) = layer_with_values(granularity), (torch.randn(5, K), torch.randn(5, N))
        optimizer = torch.optim.AdamW(trained(layer))
        loss(layer(x), target).backward()
        optimizer.step()
        half = R * (K + N) // 2
        assert sum(p.numel() for p in trained(layer)) == half
        assert sum(p.grad.numel() for p in trained(layer)) == half
        assert sum(s[name].numel() for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")) == 2 * half

    @pytest.mark.parametrize("target", ["q_proj", "up"])
    def test_a_report_counts_what_trains(self, target):
        reports = []
        for partial in (None, PartialConfig()):
            inject(model := Model(), LoRAConfig(r=2, target_modules=[target], partial=partial))
            reports.append(inject_report(model, {}, ()))
        assert reports[1].trainable * 2 == reports[0].trainable
        assert reports[1].total == reports[0].total

    @pytest.mark.parametrize("dropout", [0.0, 0.25])
    @pytest.mark.parametrize("resample", RESAMPLES)
    @pytest.mark.parametrize(("in_features", "columns"), [(K, K // 2), (1024, 512)])
    def test_a_feature_set_keeps_its_columns_of_x(self, in_features, columns, resample, dropout):
        layer = layer_with_values(resample=resample, in_features=in_features, lora_dropout=dropout)
        x = torch.randn(2, 6, in_features)
        expected = 12 * (columns + R) * 4 + 8 * (dropout > 0)
        assert saved_bytes(lambda: layer(x), exclude=layer) == expected

    def test_half_precision_with_masters_keeps_half_precision_columns(self):
        layer = layer_with_values(dtype=torch.bfloat16, adapter_dtype=torch.float32)
        x = torch.randn(12, K, dtype=torch.bfloat16)
        assert saved_bytes(lambda: layer(x), exclude=layer) == 12 * (K // 2 + R) * 2

    def test_all_features_are_no_copy_of_x(self):
        whole, x = layer_with_values(ratio=1.0), torch.randn(12, K)
        assert saved_bytes(lambda: whole(x), exclude=[whole, x]) == 12 * R * 4

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_with_A_frozen_x_is_not_kept(self, granularity):
        layer = layer_with_values(granularity, freeze_A=True)
        assert saved_bytes(lambda: layer(torch.randn(12, K)), exclude=layer) == 12 * R * 4

    def test_the_zero_half_of_B_is_not_stored(self):
        layer = LoRALinear(K, N, r=R, partial=PartialConfig())
        assert layer.adapters.default.frozen_B is None
        fresh = set(layer.state_dict())
        layer.set_lora(layer.lora_A, torch.ones(N, R))
        assert set(layer.state_dict()) == fresh | {"adapters.default.frozen_B"}
        assert (layer.lora_B == 1).all()
        layer.set_lora(layer.lora_A, layer.lora_B * layer.trainable_mask_B())
        assert layer.adapters.default.frozen_B is None

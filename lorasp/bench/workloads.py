"""What `lorasp bench` times: each provider built around the same tensors, and checked before it is timed."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorasp import rng, testing
from lorasp.bench.cases import Candidate, Provider, Shape, Unavailable, Workload
from lorasp.config import LoRAConfig
from lorasp.functional import lora_linear
from lorasp.nn import LoRALinear
from lorasp.ops import registry

_SCALE = 2.0
_SEED = 1234


def make_workload(shape: Shape, dtype: torch.dtype, device: torch.device, dropout_p: float = 0.0) -> Workload:
    """The tensors of lorasp.testing.make_inputs: the low-rank term is as large as the frozen one."""
    inputs = testing.make_inputs(shape.M, shape.K, shape.N, shape.R, dtype, device, bias=shape.bias)
    return Workload(
        shape, inputs["x"].requires_grad_(), inputs["weight"], inputs["bias"], inputs["lora_A"], inputs["lora_B"],
        inputs["dy"], _SCALE, dropout_p,
    )  # fmt: skip


def default_providers(device: torch.device, freeze_A: bool = False, prepack: bool = False) -> list[Provider]:
    """What is worth comparing on this device; freeze_A leaves only adapters with a frozen A, prepack adds +prepack."""
    adapters = ["peft", "peft-half", "peft-half-compile", "lorasp"]
    if device.type == "cuda":
        adapters += [f"lorasp:triton:{plan}" for plan in testing.lora_linear.backend_plans("triton")]
    adapters += ["lorasp+prepack"] * prepack
    trained = [Provider.parse(name) for name in adapters]
    frozen = [dataclasses.replace(provider, freeze_A=True) for provider in trained]
    base = [Provider.parse("linear"), Provider.parse("linear-train")]
    reference = Provider.parse("lorasp:reference")
    if freeze_A:
        return [*base, *frozen, dataclasses.replace(reference, freeze_A=True)]
    return [*base, *trained, *(p for p in frozen if p.kind != "peft-half-compile"), reference]


def build(provider: Provider, workload: Workload) -> Candidate:
    """The provider around the workload's tensors. Raises Unavailable, with the reason, where it cannot run here."""
    if not provider.adapts:
        return _build_linear(provider, workload)
    return (_build_lorasp if provider.kind == "lorasp" else _build_peft)(provider, workload)


def _linear(workload: Workload) -> nn.Linear:
    n, k = workload.weight.shape
    layer = nn.Linear(k, n, bias=workload.bias is not None, device="meta")
    layer.weight = nn.Parameter(workload.weight, requires_grad=False)
    if workload.bias is not None:
        layer.bias = nn.Parameter(workload.bias, requires_grad=False)
    return layer


def _build_linear(provider: Provider, workload: Workload) -> Candidate:
    layer = _linear(workload)
    inputs, names = (workload.x,), ("dx",)
    if provider.kind == "linear-train":
        # Its own copy: a weight that requires grad would cost the other providers a gradient.
        layer.weight = nn.Parameter(workload.weight.clone())
        inputs, names = (workload.x, layer.weight), ("dx", "dweight")
    return Candidate(provider, workload, functools.partial(layer, workload.x), inputs, names, layer)


def _adapted(
    provider: Provider, workload: Workload, layer: nn.Module, call: Callable, lora_A: Tensor, lora_B: Tensor, **kwargs
) -> Candidate:
    with torch.no_grad():
        lora_A.copy_(workload.lora_A)
        lora_B.copy_(workload.lora_B)
    trained = (lora_B,) if provider.freeze_A else (lora_A, lora_B)
    names = ("dlora_B",) if provider.freeze_A else ("dlora_A", "dlora_B")
    return Candidate(
        provider, workload, functools.partial(call, workload.x), (workload.x, *trained), ("dx", *names), layer,
        **kwargs,
    )  # fmt: skip


def _build_peft(provider: Provider, workload: Workload) -> Candidate:
    if importlib.util.find_spec("peft") is None:
        raise Unavailable('peft is not installed: pip install "lorasp[bench]"')
    from peft import LoraConfig, get_peft_model

    rank = workload.shape.R
    config = LoraConfig(
        r=rank, lora_alpha=rank * workload.scale, lora_dropout=workload.dropout_p, target_modules=["linear"]
    )
    holder = nn.ModuleDict({"linear": _linear(workload)})
    model = get_peft_model(holder, config, autocast_adapter_dtype=provider.kind == "peft")
    layer = model.base_model.model["linear"]
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    lora_A.requires_grad_(not provider.freeze_A)
    call = layer
    if provider.kind == "peft-half-compile":
        torch._dynamo.reset()
        call = torch.compile(layer, dynamic=False)
    return _adapted(provider, workload, layer, call, lora_A, lora_B)


def _build_lorasp(provider: Provider, workload: Workload) -> Candidate:
    device, dtype = workload.x.device.type, workload.x.dtype
    if provider.backend != "auto":
        reason = registry.unsupported(provider.backend, device, dtype)
        if reason is None and provider.plan not in ("auto", *testing.lora_linear.backend_plans(provider.backend)):
            reason = f"{provider.backend} has no plan {provider.plan}"
        if reason is not None:
            raise Unavailable(reason)
    rank = workload.shape.R
    config = LoRAConfig(
        r=rank, lora_alpha=rank * workload.scale, lora_dropout=workload.dropout_p, freeze_A=provider.freeze_A,
        prepack=provider.prepack, adapter_dtype=torch.float32 if provider.masters else None,
    )  # fmt: skip
    try:
        layer = LoRALinear.from_linear(_linear(workload), config)
    except ValueError as error:
        raise Unavailable(str(error)) from error
    context = functools.partial(registry.use_backend, provider.backend, provider.plan)
    return _adapted(provider, workload, layer, layer, layer.lora_A, layer.lora_B, context=context)


def verify(candidate: Candidate) -> None:
    """Raise AssertionError unless output and gradients meet lorasp.testing's tolerance rule.

    lorasp with dropout is compared under the same mask. PEFT draws another one, so its layer is compared with dropout
    off (eval mode).
    """
    provider, workload = candidate.provider, candidate.workload
    dropout_p = workload.dropout_p
    if provider.kind.startswith("peft"):
        candidate.layer.eval()
        dropout_p = 0.0
    torch.manual_seed(_SEED)
    seed = rng.draw_seed(workload.x.device)
    torch.manual_seed(_SEED)
    with candidate.context():
        try:
            y = candidate.forward()
        except ValueError as error:  # a backend that lacks this plan, dtype or layout says so here
            raise Unavailable(str(error)) from error
        actual = (y.detach(), *torch.autograd.grad(y, candidate.inputs, workload.dy))
    candidate.layer.train()
    for name, have in zip(("y", *candidate.names), actual, strict=True):
        want, want64 = (_expected(workload, provider.adapts, dropout_p, seed, wide)[name] for wide in (False, True))
        what = f"{provider.name} {name} at {workload.shape.label}"
        testing.assert_close(have, want, want64, workload.x.dtype, what)


def _expected(workload: Workload, adapts: bool, dropout_p: float, seed: Tensor, wide: bool) -> dict[str, Tensor]:
    """y and every gradient by the reference backend, in fp64 if wide, else in the workload's dtype; computed once."""
    key = adapts, dropout_p, wide
    if key not in workload.references:

        def leaf(tensor: Tensor) -> Tensor:
            return (tensor.double() if wide else tensor).detach().requires_grad_()

        x, weight, lora_A, lora_B = map(leaf, (workload.x, workload.weight, workload.lora_A, workload.lora_B))
        bias = None if workload.bias is None else leaf(workload.bias).detach()
        if adapts:
            leaves = {"dx": x, "dlora_A": lora_A, "dlora_B": lora_B}
            with registry.use_backend("reference"):
                y = lora_linear(
                    x, weight.detach(), lora_A, lora_B, bias, scale=workload.scale, dropout_p=dropout_p, seed=seed
                )
        else:
            leaves = {"dx": x, "dweight": weight}
            y = nn.functional.linear(x, weight, bias)
        gradients = torch.autograd.grad(y, list(leaves.values()), workload.dy.to(y.dtype))
        workload.references[key] = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
    return workload.references[key]

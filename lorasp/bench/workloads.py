"""What `lorasp bench` times: each provider built around the same tensors, and checked before it is timed."""

import dataclasses
import functools
import importlib.util

import torch
from torch import Tensor, nn

from lorasp import rng, testing
from lorasp.bench.cases import Candidate, Member, Provider, Shape, Unavailable, Workload
from lorasp.bench.composition import ComposedLoRA
from lorasp.config import LoRAConfig, PartialConfig
from lorasp.console import quiet_imports
from lorasp.functional import lora_linear_group
from lorasp.models.inject import inject
from lorasp.ops import registry

_SCALE = 2.0
_SEED = 1234


def make_workload(shape: Shape, dtype: torch.dtype, device: torch.device, dropout_p: float = 0.0) -> Workload:
    """The tensors of lorasp.testing.make_inputs: the low-rank term is as large as the frozen one."""
    inputs = [
        testing.make_inputs(shape.M, shape.K, shape.N, shape.R, dtype, device, bias=shape.bias, seed=seed)
        for seed in range(shape.members)
    ]
    members = tuple(Member(i["weight"], i["bias"], i["lora_A"], i["lora_B"], i["dy"]) for i in inputs)
    return Workload(shape, inputs[0]["x"].requires_grad_(), members, _SCALE, dropout_p)


def default_providers(
    device: torch.device, freeze_A: bool = False, prepack: bool = False, shared: bool = False
) -> list[Provider]:
    """What is worth comparing on this device; freeze_A leaves only adapters with a frozen A, prepack adds +prepack,
    shared adds +shared."""
    adapters = ["peft", "peft-half", "peft-half-compile", "aten", "lorasp", *["lorasp+shared"] * shared]
    if device.type == "cuda":
        plans = testing.lora_linear.backend_plans
        adapters += [f"lorasp:{backend}:{plan}" for backend in ("triton", "cuda") for plan in plans(backend)]
    adapters += ["lorasp+prepack"] * prepack
    adapters += ["lorasp+sp+shared" if shared else "lorasp+sp"] * (not freeze_A)
    trained = [Provider.parse(name) for name in adapters]
    frozen = [dataclasses.replace(provider, freeze_A=True) for provider in trained if not provider.partial]
    base = [Provider.parse("linear"), Provider.parse("linear-train")]
    reference = Provider.parse("lorasp:reference")
    if freeze_A:
        return [*base, *frozen, dataclasses.replace(reference, freeze_A=True)]
    return [*base, *trained, *(p for p in frozen if p.kind != "peft-half-compile"), reference]


def build(provider: Provider, workload: Workload) -> Candidate:
    """The provider around the workload's tensors. Raises Unavailable, with the reason, where it cannot run here."""
    if not provider.adapts:
        return _build_linear(provider, workload)
    builders = {"lorasp": _build_lorasp, "aten": _build_composition}
    return builders.get(provider.kind, _build_peft)(provider, workload)


def _linear(member: Member) -> nn.Linear:
    n, k = member.weight.shape
    layer = nn.Linear(k, n, bias=member.bias is not None, device="meta")
    layer.weight = nn.Parameter(member.weight, requires_grad=False)
    if member.bias is not None:
        layer.bias = nn.Parameter(member.bias, requires_grad=False)
    return layer


def _build_linear(provider: Provider, workload: Workload) -> Candidate:
    layers = nn.ModuleList(_linear(member) for member in workload.members)
    inputs, names = (workload.x,), ("dx",)
    if provider.kind == "linear-train":
        for layer in layers:
            # Its own copy: a weight that requires grad would cost the other providers a gradient.
            layer.weight = nn.Parameter(layer.weight.clone())
        inputs += tuple(layer.weight for layer in layers)
        names += tuple(f"dweight{i}" for i in range(len(layers)))
    return Candidate(provider, workload, layers, tuple(layers), inputs, names)


def _adapted(provider: Provider, workload: Workload, layers, calls, As: list[Tensor], Bs: list[Tensor], **kwargs):
    trained = {} if provider.freeze_A else {f"dlora_A{i}": tensor for i, tensor in enumerate(As)}
    trained |= {f"dlora_B{i}": tensor for i, tensor in enumerate(Bs)}
    return Candidate(
        provider, workload, nn.ModuleList(layers), tuple(calls), (workload.x, *trained.values()), ("dx", *trained),
        **kwargs,
    )  # fmt: skip


def _build_peft(provider: Provider, workload: Workload) -> Candidate:
    if importlib.util.find_spec("peft") is None:
        raise Unavailable('peft is not installed: pip install "lorasp[bench]"')
    with quiet_imports():
        from peft import LoraConfig, get_peft_model

    rank, holder = workload.shape.R, nn.ModuleDict({f"linear{i}": _linear(m) for i, m in enumerate(workload.members)})
    config = LoraConfig(
        r=rank, lora_alpha=rank * workload.scale, lora_dropout=workload.dropout_p, target_modules=list(holder)
    )
    model = get_peft_model(holder, config, autocast_adapter_dtype=provider.kind == "peft")
    layers = list(model.base_model.model.values())
    As, Bs = ([getattr(layer, name)["default"].weight for layer in layers] for name in ("lora_A", "lora_B"))
    with torch.no_grad():
        for member, lora_A, lora_B in zip(workload.members, As, Bs, strict=True):
            lora_A.copy_(member.lora_A).requires_grad_(not provider.freeze_A)
            lora_B.copy_(member.lora_B)
    calls = layers
    if provider.kind == "peft-half-compile":
        torch._dynamo.reset()
        calls = [torch.compile(layer, dynamic=False) for layer in layers]
    return _adapted(provider, workload, layers, calls, As, Bs)


def _build_composition(provider: Provider, workload: Workload) -> Candidate:
    layers = [
        ComposedLoRA(_linear(member), member.lora_A, member.lora_B, workload.scale, workload.dropout_p)
        for member in workload.members
    ]
    for layer in layers:
        layer.lora_A.requires_grad_(not provider.freeze_A)
    As, Bs = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
    return _adapted(provider, workload, layers, layers, As, Bs)


def _build_lorasp(provider: Provider, workload: Workload) -> Candidate:
    device, dtype = workload.x.device.type, workload.x.dtype
    if provider.backend != "auto":
        reason = registry.unsupported(provider.backend, device, dtype)
        if reason is None and provider.plan not in ("auto", *testing.lora_linear.backend_plans(provider.backend)):
            reason = f"{provider.backend} has no plan {provider.plan}"
        if reason is not None:
            raise Unavailable(reason)
    rank = workload.shape.R
    holder = nn.ModuleDict({f"linear{i}": _linear(member) for i, member in enumerate(workload.members)})
    config = LoRAConfig(
        r=rank, lora_alpha=rank * workload.scale, lora_dropout=workload.dropout_p, freeze_A=provider.freeze_A,
        prepack=provider.prepack, adapter_dtype=torch.float32 if provider.masters else None,
        target_modules="all-linear", partial=PartialConfig() if provider.partial else None,
        share_input=[list(holder)] if provider.shared else False,
    )  # fmt: skip
    try:
        inject(holder, config)
    except ValueError as error:
        raise Unavailable(str(error)) from error
    layers, As, Bs = list(holder.values()), [], []
    for member, layer in zip(workload.members, layers, strict=True):
        # A fresh LoRA-SP adapter: what is frozen of B is zero.
        layer.set_lora(member.lora_A, member.lora_B * layer.trainable_mask_B())
        trained = dict(layer.adapters[layer.active_adapter].named_parameters())
        As += [parameter for name, parameter in trained.items() if name.startswith("lora_A")]
        Bs += [parameter for name, parameter in trained.items() if name.startswith("lora_B")]
    context = functools.partial(registry.use_backend, provider.backend, provider.plan)
    return _adapted(provider, workload, layers, layers, As, Bs, context=context)


def verify(candidate: Candidate) -> None:
    """Raise AssertionError unless output and gradients meet lorasp.testing's tolerance rule.

    lorasp with dropout is compared under the same masks. PEFT and torch's own dropout draw others, so those layers are
    compared with dropout off (eval mode).
    """
    provider, workload = candidate.provider, candidate.workload
    dropout_p, count = workload.dropout_p, len(workload.members)
    if provider.own_masks:
        candidate.layers.eval()
        dropout_p = 0.0
    torch.manual_seed(_SEED)
    seeds = [rng.draw_seed(workload.x.device) for _ in range(1 if provider.shared else count)]
    streams = [(seeds[0], i) if provider.shared else (seeds[i], 0) for i in range(count)]
    torch.manual_seed(_SEED)
    with candidate.context():
        try:
            ys = candidate.forward()
        except ValueError as error:  # a backend that lacks this plan, dtype or layout says so here
            raise Unavailable(str(error)) from error
        gradients = torch.autograd.grad(ys, candidate.inputs, workload.dys)
    candidate.layers.train()
    want, want64 = (_expected(candidate, dropout_p, streams, wide) for wide in (False, True))
    actual = {f"y{i}": y.detach() for i, y in enumerate(ys)} | dict(zip(candidate.names, gradients, strict=True))
    for name, have in actual.items():
        what = f"{provider.name} {name} at {workload.shape.label}"
        testing.assert_close(have, want[name], want64[name], workload.x.dtype, what)


def _expected(candidate: Candidate, dropout_p: float, streams: list, wide: bool) -> dict[str, Tensor]:
    """Outputs and every gradient by the reference backend, in fp64 if wide, else in the workload's dtype.

    streams: (seed, member) of every layer's mask. Computed once for all providers of the same function.
    """
    provider, workload = candidate.provider, candidate.workload
    # Each LoRA-SP provider has frozen parts of its own.
    function = provider if provider.partial else (provider.adapts, provider.shared and dropout_p > 0)
    key = function, dropout_p, wide
    if key in workload.references:
        return workload.references[key]

    def leaf(tensor: Tensor) -> Tensor:
        return (tensor.double() if wide else tensor).detach().requires_grad_()

    x, total, expected = workload.x.detach(), 0, {}
    for i, (layer, member, (seed, stream)) in enumerate(zip(candidate.layers, workload.members, streams, strict=True)):
        bias = None if member.bias is None else leaf(member.bias).detach()
        leaves = {"x": leaf(x)}
        if provider.adapts:
            factors = (layer.lora_A, layer.lora_B) if provider.partial else (member.lora_A, member.lora_B)
            leaves |= dict(zip(("lora_A", "lora_B"), map(leaf, factors), strict=True))
            with registry.use_backend("reference"):
                (y,) = lora_linear_group(
                    leaves["x"], [leaf(member.weight).detach()], [leaves["lora_A"]], [leaves["lora_B"]], [bias],
                    scales=workload.scale, dropout_p=dropout_p, seed=seed, members=[stream],
                )  # fmt: skip
        else:
            leaves["weight"] = leaf(member.weight)
            y = nn.functional.linear(leaves["x"], leaves["weight"], bias)
        gradients = torch.autograd.grad(y, list(leaves.values()), member.dy.to(y.dtype))
        found = dict(zip(leaves, gradients, strict=True))
        total = total + found.pop("x")
        if provider.partial:
            masks = {"lora_A": layer.trainable_mask_A(), "lora_B": layer.trainable_mask_B()}
            trained = {name: f"d{name}{i}" for name in found if f"d{name}{i}" in candidate.names}
            shapes = {name: candidate.inputs[candidate.names.index(trained[name])].shape for name in trained}
            found = {name: found[name][masks[name]].view(shapes[name]) for name in trained}
        expected |= {f"y{i}": y.detach()} | {f"d{name}{i}": gradient for name, gradient in found.items()}
    workload.references[key] = expected | {"dx": total}
    return workload.references[key]

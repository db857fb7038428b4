"""LoRAFAAdamW: AdamW on LoRA-FA's corrected gradient of B."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorasp.adapter.adapter import Adapter
from lorasp.adapter.partial_adapter import PackedAdapter, PartialAdapter
from lorasp.optim.partial_adamw import PartialAdamW
from lorasp.sharding import full, local

DELTA = 1e-8  # PEFT's regulariser of A A^T


class LoRAFAAdamW(PartialAdamW):
    """AdamW for adapters whose A is frozen (LoRA-FA), with the gradient of B corrected for what A is.

        gB' = gB pinv(A A^T + 1e-8 I) / s^2          gB (N, R), A (R, K), s: the adapter's scale

    With G (N, K) the gradient of the whole weight, gB = s G A^T (no dropout) and s gB' A = G P, where P (K, K) projects
    on the space of A's rows: of all changes of the weight that a change of B can make, the nearest to G. AdamW then
    scales entry by entry, so its step is no projection any more. The rest of G is out of LoRA-FA's reach, which can
    cost accuracy against LoRA.

    model: holds the adapters: lorasp's with freeze_A=True, any number per layer, and PEFT's linear LoRA layers whose
    lora_A does not require grad. params: the model's parameters that require grad (default), or parameters or groups as
    every torch optimizer takes them; whatever is not such a B is stepped as torch.optim.AdamW does, B beside an A that
    trains included. lr, betas, eps, weight_decay: torch.optim.AdamW's, with the defaults of PEFT's LoRA-FA optimizer.

    LoRA-SP: the rows of B that train are corrected as if alone, packed or resampled; of granularity "rank" only those
    rows of A count that B's trained columns meet. "element" is refused: it would take an inverse per row of B.

    The R x R inverse is made in fp64 once per A, kept in fp32 (fp64 for fp64), and made again when A's storage or
    version or the scale changes; a write through `lora_A.data[...]` changes none of them. gB' is computed in fp32 and
    rounded once to B's dtype; .grad stays as it is, so clipping sees gB. A bf16 B loses updates below half a unit in
    its last place: adapter_dtype=torch.float32 keeps fp32 masters. State and state_dict are PartialAdamW's; inverses
    are not in them. B sharded by rows (fully_shard) is corrected where it lies.

    Raises TypeError and ValueError for arguments that do not fit, DoRA, and params without a B to correct, RuntimeError
    for sparse gradients.
    Source: LoRA-FA, arXiv 2308.03303; the correction as in PEFT's optimizers/lorafa.py, which computes it in bf16.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"LoRAFAAdamW: model must be an nn.Module, got {type(model).__name__}")
        self._model = model
        self._frozen: dict[Tensor, _Own | _Peft] = {}
        self._inverses: dict[Tensor, _Inverse] = {}
        super().__init__(model if params is None else params, lr, betas, eps, weight_decay)
        if not self._frozen:
            raise ValueError("LoRAFAAdamW: params must hold a lora_B whose lora_A is frozen (freeze_A=True), got none")

    def add_param_group(self, param_group: dict) -> None:
        """As in every torch optimizer; adapters that the model has got since are found."""
        super().add_param_group(param_group)
        added = set(self.param_groups[-1]["params"])
        for lora_B, frozen in _frozen_factors(self._model):
            if lora_B in added:
                frozen.check(lora_B)
                self._frozen[lora_B] = frozen

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_model": self._model, "_frozen": self._frozen, "_inverses": {}}

    def _gradient(self, parameter: Tensor) -> Tensor:
        grad = super()._gradient(parameter)
        if parameter not in self._frozen:
            return grad
        inverse = self._inverse(parameter)
        with torch.autocast(grad.device.type, enabled=False):
            return (grad.reshape(-1, inverse.shape[0]).to(inverse.dtype) @ inverse).to(grad.dtype).view(grad.shape)

    def _inverse(self, lora_B: Tensor) -> Tensor:
        """pinv(A A^T + 1e-8 I) / s^2, (R, R) symmetric."""
        frozen = self._frozen[lora_B]
        sources, dtype = frozen.sources(), torch.promote_types(lora_B.dtype, torch.float32)
        state = [(id(source), source._version, local(source).data_ptr()) for source in sources]
        state += [frozen.scale(), dtype, lora_B.device]
        known = self._inverses.get(lora_B)
        if known is None or known.made_from != state:
            inverse = _pinv(frozen.rows(), torch.finfo(dtype).eps) / frozen.scale() ** 2
            if (place := frozen.place()) is not None:
                inverse = inverse.new_zeros((len(place), len(place))).masked_scatter(place[:, None] & place, inverse)
            known = self._inverses[lora_B] = _Inverse(sources, state, inverse.to(lora_B.device, dtype))
        return known.value


class _Inverse(NamedTuple):
    """What was computed, and of what; holding the tensors keeps their ids from being used again."""

    sources: tuple[Tensor, ...]
    made_from: list
    value: Tensor


def _pinv(rows: Tensor, eps: float) -> Tensor:
    """pinv(A A^T + 1e-8 I) in fp64; directions that A spans by rounding only (pinv's own bound in B's dtype) give 0."""
    rows = rows.detach().double()
    gram = rows @ rows.t()
    gram.diagonal().add_(DELTA)
    return torch.linalg.pinv(gram, rtol=len(rows) * eps, hermitian=True)


class _Own(NamedTuple):
    """A frozen lora_A of lorasp's."""

    adapter: Adapter

    def check(self, lora_B: Tensor) -> None:
        if self._granularity() == "element":
            raise ValueError(
                "LoRAFAAdamW: granularity must be 'feature', 'rank' or 'matrix' where A is frozen, got 'element'"
            )
        _check_shards(lora_B)

    def _granularity(self) -> str | None:
        return self.adapter.partial.granularity if isinstance(self.adapter, PartialAdapter) else None

    def sources(self) -> tuple[Tensor, ...]:
        adapter = self.adapter
        return (adapter.lora_A, adapter.active_B) if self._granularity() == "rank" else (adapter.lora_A,)

    def scale(self) -> float:
        return self.adapter.scale

    def rows(self) -> Tensor:
        """The rows of A (R, K) that what trains of B meets."""
        lora_A, *active = self.sources()
        return lora_A[active[0].flatten()] if active else lora_A

    def place(self) -> Tensor | None:
        """bool (R,): which columns of the gradient these rows belong to, if not all."""
        _, *active = self.sources()
        return active[0].flatten() if active and not isinstance(self.adapter, PackedAdapter) else None


class _Peft(NamedTuple):
    """A lora_A of PEFT's that does not require grad."""

    layer: nn.Module
    name: str

    def check(self, lora_B: Tensor) -> None:
        if getattr(self.layer, "use_dora", {}).get(self.name):
            raise ValueError(f"LoRAFAAdamW: adapters must be plain LoRA, got DoRA in adapter {self.name!r}")
        _check_shards(lora_B)

    def sources(self) -> tuple[Tensor]:
        return (self.layer.lora_A[self.name].weight,)

    def scale(self) -> float:
        return self.layer.scaling[self.name]

    def rows(self) -> Tensor:
        (lora_A,) = self.sources()
        return full(lora_A)

    def place(self) -> None:
        return None


def _check_shards(lora_B: Tensor) -> None:
    """The correction mixes the columns of a row: a process must hold whole rows."""
    for placement in getattr(lora_B, "placements", ()):
        if not placement.is_replicate() and not (placement.is_shard(0) and lora_B.dim() == 2):
            raise ValueError(f"LoRAFAAdamW: lora_B must be sharded by whole rows, got {placement}")


def _frozen_factors(model: nn.Module) -> Iterator[tuple[Tensor, _Own | _Peft]]:
    """Every B of the model whose A is frozen, with where to find that A."""
    for module in model.modules():
        if isinstance(module, Adapter):
            if module.freeze_A:
                yield from ((lora_B, _Own(module)) for lora_B in module.parameters(recurse=False))
            continue
        factors_A, factors_B = module._modules.get("lora_A"), module._modules.get("lora_B")
        if isinstance(factors_A, nn.ModuleDict) and isinstance(factors_B, nn.ModuleDict):
            for name, factor in factors_A.items():
                if isinstance(factor, nn.Linear) and not factor.weight.requires_grad:
                    yield factors_B[name].weight, _Peft(module, name)

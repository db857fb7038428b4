"""PartialAdamW: AdamW for adapters whose selection changes (LoRA-SP with resampling)."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorasp.adapter.partial_adapter import ResampledAdapter, find_owners, owner
from lorasp.ops import registry
from lorasp.ops.partial_adamw import step_ops
from lorasp.sharding import is_sharded, local, placed


class PartialAdamW(Optimizer):
    """AdamW (decoupled weight decay) that leaves entries outside their adapter's selection alone, to the bit.

    params: a model (its parameters that require grad), or what every torch optimizer takes: parameters or groups.
    lr, betas, eps, weight_decay: torch.optim.AdamW's.

    For dense lora_A and lora_B of adapters with PartialConfig(resample=...): an entry outside the selection keeps its
    value, and its moments until it is selected again; bias correction counts the entry's own active steps. resample=k
    gives every k-th step a new selection to the adapters with that k among the parameters. Every other parameter,
    packed ones of a fixed selection included, is stepped as torch.optim.AdamW does. All parameters of one device and
    dtype are stepped in one pass; arithmetic is in fp32 (fp64 for fp64), the moments have the parameter's dtype.

    State per parameter: exp_avg, exp_avg_sq, and step: int32, one per row, column or entry where selections are; of
    sharded parameters (fully_shard) sharded as they are. The selections themselves are in the model's state_dict.
    Raises TypeError and ValueError for arguments that do not fit, RuntimeError for sparse gradients.
    Source: AdamW arXiv 1711.05101; LoRA-SP arXiv 2403.08822 says nothing of optimizer state: this is our reading.
    """

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        own = type(self).__name__
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{own}: {name} must be a finite number >= 0, got {value!r}")
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"{own}: betas must be two numbers in [0, 1), got {betas!r}")
        if isinstance(params, nn.Module):
            params = [parameter for parameter in params.parameters() if parameter.requires_grad]
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "steps_taken": 0}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """As in every torch optimizer."""
        find_owners()
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; closure re-evaluates the model and returns the loss, as in every torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
            group["steps_taken"] += 1
        self._resample()
        return loss

    def _step_group(self, group: dict) -> None:
        batches: dict[tuple, list[list[Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__}: gradients must be dense, got a sparse one")
            active = _active(parameter)
            state = self.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
                state["step"] = _steps(parameter, active, torch.zeros((), dtype=torch.int32))
            batch = batches.setdefault((parameter.device, parameter.dtype), [[] for _ in range(6)])
            values = (
                local(parameter.detach()),
                self._gradient(parameter),
                *(local(state[n]) for n in ("exp_avg", "exp_avg_sq", "step")),
                active if active is None or not is_sharded(parameter) else local(placed(active, parameter)),
            )
            for tensors, tensor in zip(batch, values, strict=True):
                tensors.append(tensor)
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        for (device, dtype), batch in batches.items():
            backend = registry.choose("partial_adamw", device.type, dtype)
            step_ops[backend](*batch, lr, beta1, beta2, group["eps"], group["weight_decay"])
            # Compiled backends write past autograd's version counters, which tell a stale prepacked weight.
            torch.autograd.graph.increment_version(batch[0])

    def _gradient(self, parameter: Tensor) -> Tensor:
        """What AdamW takes for the gradient, in its shape and dtype; of a sharded parameter, this process's part."""
        return local(parameter.grad)

    def _resample(self) -> None:
        taken = self.param_groups[0]["steps_taken"]
        adapters: dict[ResampledAdapter, None] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if (owned := owner(parameter)) is not None:
                    adapters[owned[0]] = None
        for adapter in adapters:
            every = adapter.partial.resample
            if isinstance(every, int) and taken % every == 0:
                adapter.resample()

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a state of PartialAdamW, or of torch.optim.AdamW, whose one count of steps is then every entry's.

        Raises ValueError for the state of another granularity.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("steps_taken", 0)
        # Optimizer moves and casts every tensor of a parameter's state except "step".
        for parameter, state in self.state.items():
            if "step" in state:
                active, step = _active(parameter), torch.as_tensor(state["step"])
                shape = (1,) if active is None else active.shape
                if step.numel() > 1 and step.shape != shape:
                    raise ValueError(
                        f"{type(self).__name__}: step in state_dict must be {tuple(shape)} like the selection, "
                        f"got {tuple(step.shape)}"
                    )
                state["step"] = _steps(parameter, active, step)


def _steps(parameter: Tensor, active: Tensor | None, step: Tensor) -> Tensor:
    """int32 counts of steps, one per unit of the selection, sharded as the parameter is; from one count or as many."""
    shape = (1,) if active is None else active.shape
    if is_sharded(step):
        return step.to(parameter.device, torch.int32).clone()
    step = step.to(parameter.device, torch.int32)
    step = (step if step.shape == shape else step.flatten()).expand(shape).clone()
    return placed(step, parameter) if active is not None and is_sharded(parameter) else step


def _active(parameter: Tensor) -> Tensor | None:
    """Where the selection of its adapter lets this parameter train; None for everywhere."""
    owned = owner(parameter)
    return owned and owned[0].active(owned[1])

"""What `lorasp bench --model` times: training steps of whole models, adapted by PEFT and by lorasp, in one run.

A step is forward, loss, backward to the adapters and to the input embeddings, and the optimizer's step. The variants
share one set of frozen weights, start from one A and one B, and take turns step by step (timing.interleave: the frozen
model before and after each), so that every ratio is one within a round. Bytes saved for backward are those of forward
to the logits. What a variant keeps resident is measured in a process of its own.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorasp import testing
from lorasp.bench import child
from lorasp.bench.model_variants import (
    ALPHA,
    BASE,
    MODELS,
    PEFT,
    SEED,
    VARIANTS,
    ModelCase,
    adapt_with_lorasp,
    adapt_with_peft,
    adapted_layers,
    factors,
    set_factors,
    trained,
)
from lorasp.bench.timing import interleave, make_clock, spread
from lorasp.bench.verify import verify_case
from lorasp.memory import saved_bytes

_LR = 1e-4


@dataclass
class Candidate:
    """A variant of a model, with what a step of it needs."""

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]

    def __post_init__(self):
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=_LR) if parameters else None
        self.leaves = {name: tensor for name, tensor in self.inputs.items() if tensor.requires_grad}

    def logits(self) -> Tensor:
        return self.model(**self.leaves).logits

    def step(self) -> None:
        self.model(**self.inputs).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        self.model.zero_grad()
        for leaf in self.leaves.values():
            leaf.grad = None

    @property
    def optimizer_bytes(self) -> int:
        states = self.optimizer.state.values() if self.optimizer else ()
        return sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor) and t.ndim)


@dataclass
class Observed:
    """What a variant computes with dropout off: logits, gradients of the inputs, and of A and B by (layer, "A"|"B")."""

    logits: Tensor
    inputs: dict[str, Tensor]
    factors: dict[tuple[str, str], Tensor]

    @classmethod
    def of(cls, candidate: Candidate) -> "Observed":
        model = candidate.model.eval()
        logits = candidate.logits()
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(SEED))
        logits.backward(direction.to(logits))
        inputs = {f"d{name}": leaf.grad for name, leaf in candidate.leaves.items()}
        found = {
            (name, which): parameter.grad
            for name, layer in adapted_layers(model).items()
            for which, parameter, _ in trained(layer)
        }
        candidate.drop_gradients()
        model.train()
        return cls(logits.detach(), inputs, found)

    def tensors(self, masks: dict[tuple[str, str], Tensor] | None = None) -> dict[str, Tensor]:
        """What is compared. All layers' gradients of A make one tensor, and of B: an early rounding that a chain of
        softmaxes amplifies can be a single small gradient's whole error, whichever kernel rounded.

        masks: the entries that count, of every factor that does.
        """
        gradients: dict[str, list[Tensor]] = {}
        for key in masks or self.factors:
            grad = self.factors[key]
            gradients.setdefault(f"dlora_{key[1]}", []).append(grad[masks[key]] if masks else grad.flatten())
        return {"logits": self.logits, **self.inputs, **{name: torch.cat(rows) for name, rows in gradients.items()}}


@dataclass
class Workload:
    """One frozen model and its batch, which every variant is built around."""

    case: ModelCase
    base: nn.Module
    inputs: dict[str, Tensor]
    dropout_p: float
    references: dict[tuple, Observed] = field(default_factory=dict)

    @classmethod
    def of(
        cls, name: str, dtype: torch.dtype, device: torch.device, dropout_p: float, checkpointing: bool = False
    ) -> "Workload":
        case = MODELS[name]
        base = case.build(dtype, device, checkpointing)
        return cls(case, base, case.inputs(base, dtype, device), dropout_p)

    def build(self, variant: str) -> Candidate:
        """The variant around the base's own tensors, with the A and B that all variants start from."""
        model = VARIANTS[variant].adapt(self.duplicate(), self.case.rank, self.dropout_p)
        generator = torch.Generator().manual_seed(SEED)
        for layer in adapted_layers(model).values():
            (r, k), (n, _) = (tensor.shape for tensor in factors(layer))
            # The low-rank term is about as large as the frozen one: a missing one would show.
            lora_A = torch.randn(r, k, generator=generator) * k**-0.5
            lora_B = torch.randn(n, r, generator=generator) * r**0.5 / ALPHA
            set_factors(layer, *(tensor.to(self.base.device, self.base.dtype) for tensor in (lora_A, lora_B)))
        return Candidate(variant, model, self.inputs)

    def duplicate(self) -> nn.Module:
        """The frozen model's modules once more, around the same tensors."""
        tensors = (*self.base.parameters(), *self.base.buffers())
        return copy.deepcopy(self.base, {id(tensor): tensor for tensor in tensors})

    def reference(self, candidate: Candidate, dtype: torch.dtype) -> Observed:
        """The same A and B in plain PyTorch (PEFT's layers), in dtype; made once for all that have the same."""
        have = {name: factors(layer) for name, layer in adapted_layers(candidate.model).items()}
        key = dtype, sum(int(lora_B.count_nonzero()) for _, lora_B in have.values())
        if key not in self.references:
            model = adapt_with_peft(copy.deepcopy(self.base).to(dtype), self.case.rank, 0.0, masters=False)
            layers = adapted_layers(model)
            if layers.keys() != have.keys():
                raise AssertionError(f"{candidate.name}: adapts other layers than PEFT: {layers.keys() ^ have.keys()}")
            for name, layer in layers.items():
                set_factors(layer, *have[name])
            leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in candidate.leaves.items()}
            self.references[key] = Observed.of(Candidate("reference", model, leaves))
        return self.references[key]


def verify(candidate: Candidate, workload: Workload) -> None:
    """Raise AssertionError unless logits and every gradient meet lorasp.testing's rule, with dropout off.

    PEFT draws other masks than ours; verify_operators compares ours.
    """
    dtype = workload.base.dtype
    layers = adapted_layers(candidate.model)
    masks = {(name, which): mask for name, layer in layers.items() for which, _, mask in trained(layer)}
    want, want64 = (workload.reference(candidate, wide).tensors(masks) for wide in (dtype, torch.float64))
    for name, have in Observed.of(candidate).tensors().items():
        testing.assert_close(have, want[name], want64[name], dtype, f"{candidate.name} {name}")


def verify_operators(workload: Workload, device: torch.device) -> None:
    """lorasp's operators at the model's widths against the fp64 reference, with this run's dropout and one mask."""
    dtype, rank = workload.base.dtype, workload.case.rank
    layers = adapted_layers(adapt_with_lorasp(workload.duplicate(), rank, 0.0))
    for k, n in sorted({(layer.in_features, layer.out_features) for layer in layers.values()}):
        for operator, switches in (
            (testing.lora_linear, {}),
            (testing.lora_linear, {"freeze_A": True}),
            (testing.lora_linear_group, {"members": 3}),
            (testing.lora_linear_group, {"members": 2, "granularity": "feature"}),
        ):
            case = operator.Case(64, k, n, rank, dtype, dropout_p=workload.dropout_p, **switches)
            verify_case(operator, case, device)


@dataclass(frozen=True)
class Row:
    """One variant: milliseconds a step, ratios within a round to the frozen model and to PEFT as it comes, bytes.

    _q1, _q3: quartiles over rounds. saved_over_frozen: of saved_bytes, what the frozen model does not save. peak_bytes:
    model_memory.measure()'s, None if not measured or if a process of its own has no memory for it.
    """

    model: str
    variant: str
    dtype: str
    dropout_p: float
    batch: int
    tokens: int
    rank: int
    rounds: int
    ms: float
    ms_q1: float
    ms_q3: float
    ratio: float
    ratio_q1: float
    ratio_q3: float
    to_peft: float
    to_peft_q1: float
    to_peft_q3: float
    saved_bytes: int
    saved_over_frozen: int
    peak_bytes: int | None
    trainable: int
    optimizer_bytes: int


@dataclass
class ModelResult:
    """The variants of one model that were measured, and why others could not be built around it."""

    rows: list[Row] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)


def run(
    name: str,
    variants: Sequence[str],
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    dropout_p: float = 0.0,
    rounds: int | None = None,
    seconds: float = 20.0,
    peaks: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> ModelResult:
    """Build, verify and time variants of MODELS[name]; the frozen model and PEFT as it comes are always among them.

    Raises AssertionError if a variant computes something else than PEFT's layers in fp64 within lorasp.testing's
    tolerance.
    """
    device = torch.device(device)
    workload = Workload.of(name, dtype, device, dropout_p)
    progress(f"{name}: checking operators")
    verify_operators(workload, device)
    result, candidates = ModelResult(), []
    for variant in dict.fromkeys((BASE, PEFT, *variants)):
        progress(f"{name}: checking {variant}")
        try:
            candidates.append(workload.build(variant))
        except ValueError as reason:
            result.unavailable[variant] = str(reason)
            continue
        if variant != BASE:
            verify(candidates[-1], workload)
    workload.references.clear()
    progress(f"{name}: timing {len(candidates)} variants")
    steps = [candidate.step for candidate in candidates]
    samples = interleave(steps[0], steps, make_clock(device), rounds, seconds)
    saved = [saved_bytes(candidate.logits, exclude=candidate.model) for candidate in candidates]
    for candidate, sample, kept in zip(candidates, samples, saved, strict=True):
        progress(f"{name}: peak memory of {candidate.name}")
        peak = child.ask(name, candidate.name, dtype, device, dropout_p).get("peak_bytes") if peaks else None
        result.rows.append(
            Row(
                model=name, variant=candidate.name, dtype=str(dtype).removeprefix("torch."), dropout_p=dropout_p,
                batch=workload.case.batch, tokens=workload.case.tokens, rank=workload.case.rank, rounds=len(sample),
                **spread(sample, samples[1]), saved_bytes=kept, saved_over_frozen=kept - saved[0], peak_bytes=peak,
                trainable=candidate.trainable, optimizer_bytes=candidate.optimizer_bytes,
            )
        )  # fmt: skip
    return result

"""dropkey_attention: its inputs, its cases, and one case against the fp64 reference."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorasp.functional import dropkey_attention
from lorasp.ops import registry
from lorasp.testing.rule import CheckResult, compare

SHAPE = ("B", "H", "Hkv", "Sq", "Sk", "D", "Dv")
DEFAULT_SHAPES = (
    (2, 4, 2, 65, 65, 64, 64),
    (1, 3, 3, 33, 97, 20, 40),
    (2, 2, 1, 1, 130, 128, 128),
    (1, 2, 2, 130, 47, 7, 5),
)
PATTERNS = ("column", "element", "span")
MASKS = ("none", "bool", "padding", "bias", "bias32", "min")


@dataclass(frozen=True)
class Case:
    """One call of dropkey_attention: sizes, dtype and what is switched on.

    mask: none; bool (1, 1, Sq, Sk); padding, bool (B, 1, 1, Sk); bias, additive (1, H, Sq, Sk) in q's dtype that takes
    a gradient (bias32: in float32); min, additive (B, 1, Sq, Sk) of zeros and finfo.min.
    """

    B: int
    H: int
    Hkv: int
    Sq: int
    Sk: int
    D: int
    Dv: int
    dtype: torch.dtype = torch.float32
    pattern: str = "column"
    dropout_p: float = 0.0
    is_causal: bool = False
    mask: str = "none"
    needs: str = "qkv"
    scale: float | None = None
    seed: int = 0

    def __str__(self) -> str:
        words = [f"{self.B}x{self.H}/{self.Hkv}x{self.Sq}x{self.Sk}", f"d{self.D}/{self.Dv}"]
        words += [str(self.dtype).removeprefix("torch.")]
        words += [f"{self.pattern} p={self.dropout_p:g}"] * (self.dropout_p > 0) + ["causal"] * self.is_causal
        words += [self.mask] * (self.mask != "none") + [f"d{self.needs}"] * (self.needs != "qkv")
        return " ".join(words)


def make_inputs(case: Case, device: str | torch.device = "cpu") -> dict[str, Tensor | None]:
    """q, k, v, attn_mask and do. Logits spread over several units, so that the softmax is neither flat nor one-hot."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, case.dtype)

    return {
        "q": normal(case.B, case.H, case.Sq, case.D) * 2,
        "k": normal(case.B, case.Hkv, case.Sk, case.D),
        "v": normal(case.B, case.Hkv, case.Sk, case.Dv),
        "attn_mask": _make_mask(case, generator).to(device) if case.mask != "none" else None,
        "do": normal(case.B, case.H, case.Sq, case.Dv),
    }


def _make_mask(case: Case, generator: torch.Generator) -> Tensor:
    if case.mask == "padding":
        lengths = torch.randint((case.Sk + 1) // 2, case.Sk + 1, (case.B, 1, 1, 1), generator=generator)
        return torch.arange(case.Sk) < lengths
    if case.mask.startswith("bias"):
        dtype = torch.float32 if case.mask == "bias32" and case.dtype != torch.float64 else case.dtype
        return torch.randn(1, case.H, case.Sq, case.Sk, generator=generator, dtype=torch.float64).to(dtype)
    if case.mask == "min":
        hidden = torch.rand(case.B, 1, case.Sq, case.Sk, generator=generator) < 0.3
        return torch.zeros(hidden.shape, dtype=case.dtype).masked_fill(hidden, torch.finfo(case.dtype).min)
    if case.mask == "bool":
        return torch.rand(1, 1, case.Sq, case.Sk, generator=generator) < 0.7
    raise ValueError(f"Case: mask must be one of {', '.join(MASKS)}, got {case.mask!r}")


def run(inputs: dict, case: Case, function: Callable = dropkey_attention) -> dict[str, Tensor]:
    """o and the gradients of one case: {"o", "dq", "dk", "dv", "dattn_mask"}, without what is not needed."""
    arguments = {name: None if t is None else t.detach() for name, t in inputs.items() if name != "do"}
    wanted = [name for name in ("q", "k", "v") if name in case.needs]
    wanted += ["attn_mask"] if case.mask.startswith("bias") else []
    for name in wanted:
        arguments[name].requires_grad_()
    o = function(
        **arguments, dropout_p=case.dropout_p, pattern=case.pattern, is_causal=case.is_causal, scale=case.scale,
        enable_gqa=case.Hkv != case.H, seed=case.seed + 1,
    )  # fmt: skip
    gradients = torch.autograd.grad(o, [arguments[name] for name in wanted], inputs["do"])
    return {"o": o.detach()} | {f"d{name}": grad for name, grad in zip(wanted, gradients, strict=True)}


def in_float64(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same values in fp64; what an additive mask hides stays hidden."""

    def convert(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype == torch.bool:
            return tensor
        hidden = tensor <= torch.finfo(tensor.dtype).min / 2
        return tensor.double().masked_fill(hidden, float("-inf"))

    return {name: convert(tensor) for name, tensor in inputs.items()}


def check_case(case: Case, backend: str, plan: str = "auto", device: str | torch.device = "cpu") -> list[CheckResult]:
    """Every output of one case on one backend, against the fp64 reference."""
    inputs = make_inputs(case, device)
    with registry.use_backend("reference"):
        reference64 = run(in_float64(inputs), replace(case, dtype=torch.float64))
        reference = run(inputs, case)
    with registry.use_backend(backend, plan):
        actual = run(inputs, case)
    return compare("dropkey_attention", backend, plan, case, actual, reference, reference64, case.dtype)


def cases(shapes: Iterable[tuple[int, ...]], dtypes: Iterable[torch.dtype]) -> Iterator[Case]:
    """The variants check() runs on every shape and dtype."""
    for dtype in dtypes:
        for sizes in shapes:
            plain = Case(*sizes, dtype=dtype)
            yield plain
            yield replace(plain, dropout_p=0.1, is_causal=plain.Sq > 1)
            yield replace(plain, dropout_p=0.3, mask="padding")
            yield replace(plain, dropout_p=0.3, pattern="span", mask="min")
            yield replace(plain, dropout_p=0.1, pattern="element", mask="bias")


def backend_plans(backend: str) -> tuple[str, ...]:
    """The operator has one way of ordering its work."""
    return ("auto",)


def plan_obstacle(backend: str, plan: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> str | None:
    """Why `backend` cannot compute in `dtype` on this machine; None where it can."""
    if plan != "auto":
        return f"dropkey_attention: plan must be auto, got {plan!r}"
    return None if backend == "auto" else registry.unsupported(backend, torch.device(device).type, dtype)

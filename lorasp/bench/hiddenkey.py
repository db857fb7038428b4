"""What `lorasp bench --op dropkey_attention|hidden_cut|consistency` times: HiddenKey's operators against PyTorch's.

Per shape one contest: forward and backward of every entry, each sample divided by the mean of the base's before and
after it (timing.interleave). Bases: scaled_dot_product_attention without any drop (causal to causal); nn.Dropout and a
residual add; the KL formula written in PyTorch. Entries are checked by lorasp.testing first, on a shape of that kind.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, scaled_dot_product_attention

from lorasp import rng, testing
from lorasp.bench.timing import interleave, make_clock, quartiles
from lorasp.functional import consistency_loss, dropkey_attention, hidden_cut
from lorasp.memory import saved_bytes

# What a shape's numbers are, per operator, and the ones that are measured without any given.
SIZES = {
    "dropkey_attention": ("B,H,S,D", ((4, 12, 512, 64), (1, 16, 2048, 64))),
    "hidden_cut": ("B,S,F", ((4, 512, 768), (1, 2048, 4096))),
    "consistency": ("M,V", ((2048, 32000),)),
}
RATES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
_SEED = 3


@dataclass(frozen=True)
class Entry:
    """Something that is timed: a line of the plot and the drop rate at which it stands."""

    name: str
    rate: float | None
    forward: Callable[[], Tensor]
    step: Callable[[], object]


@dataclass(frozen=True)
class Row:
    """Milliseconds of forward + backward and ratio to the base: medians, with quartiles as their spread."""

    op: str
    sizes: tuple[int, ...]
    dtype: str
    causal: bool
    name: str
    rate: float | None
    rounds: int
    ms: float
    ratio: float
    ratio_q1: float
    ratio_q3: float
    saved_bytes: int


@dataclass
class Contest:
    op: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    causal: bool
    rows: list[Row] = field(default_factory=list)

    @property
    def title(self) -> str:
        names, dtype = SIZES[self.op][0], str(self.dtype).removeprefix("torch.")
        sizes = "×".join(map(str, self.sizes))
        return f"{self.op} {sizes} ({names.replace(',', '×')}), {dtype}" + ", causal" * self.causal


def run(
    op: str,
    shapes: Sequence[tuple[int, ...]] | None = None,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    rates: Sequence[float] = RATES,
    causal: bool = False,
    rounds: int | None = None,
    seconds: float = 20.0,
) -> Iterator[Contest]:
    """Check, build and time; yields one Contest per shape. Raises AssertionError if a kernel is wrong."""
    device = torch.device(device)
    build = {"dropkey_attention": _attention, "hidden_cut": _hidden_cut, "consistency": _consistency}[op]
    for sizes in shapes or SIZES[op][1]:
        verify(op, sizes, dtype, device)
        contest = Contest(op, tuple(sizes), dtype, causal)
        entries = build(sizes, dtype, device, rates, causal)
        steps = [entry.step for entry in entries]
        samples = interleave(steps[0], steps, make_clock(device), rounds, seconds)
        for entry, sample in zip(entries, samples, strict=True):
            ratio_q1, ratio, ratio_q3 = quartiles([value for _, value in sample])
            ms = quartiles([1e3 * took for took, _ in sample])[1]
            contest.rows.append(
                Row(
                    op,
                    contest.sizes,
                    str(dtype).removeprefix("torch."),
                    causal,
                    entry.name,
                    entry.rate,
                    len(sample),
                    ms,
                    ratio,
                    ratio_q1,
                    ratio_q3,
                    saved_bytes(entry.forward),
                )
            )
        yield contest


def verify(op: str, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """lorasp.testing's comparison at these sizes, the long ones cut to what an fp64 reference takes seconds for."""
    operator = testing.OPERATORS[op]
    if op == "dropkey_attention":
        _, h, s, d = sizes
        shape = (1, min(h, 2), min(h, 2), min(s, 256), min(s, 256), d, d)
    else:
        shape = (*(min(size, 64) for size in sizes[:-1]), sizes[-1])
    for case in operator.cases([shape], [dtype]):
        for result in operator.check_case(case, "auto", "auto", device):
            if not result.ok:
                raise AssertionError(
                    f"{op} {result.tensor} [{result.case}]: error {result.error:.3e} exceeds {result.bound:.3e}"
                )


def _normal(*shape: int, dtype, device) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device)


def _entry(name: str, rate: float | None, forward: Callable[[], Tensor], inputs, gradient: Tensor | None) -> Entry:
    return Entry(name, rate, forward, lambda: torch.autograd.grad(forward(), inputs, gradient))


def _attention(sizes, dtype, device, rates, causal) -> list[Entry]:
    b, h, s, d = sizes
    torch.manual_seed(_SEED)
    # As models have them: (B, S, H, D), transposed.
    q, k, v = (_normal(b, s, h, d, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for _ in range(3))
    do = _normal(b, s, h, d, dtype=dtype, device=device).transpose(1, 2)
    entry = functools.partial(_entry, inputs=(q, k, v), gradient=do)

    def kept(rate: float) -> Tensor:
        seed = torch.tensor(_SEED, device=device)
        keep = rng.keep_mask(seed, (b, h, 1, s), rate, rng.PURPOSE_DROPKEY)
        return keep & torch.ones(s, s, dtype=torch.bool, device=device).tril() if causal else keep

    def eager(keep: Tensor) -> Tensor:
        logits = (q @ k.transpose(-1, -2) * d**-0.5).masked_fill(~keep, torch.finfo(dtype).min)
        return logits.softmax(-1) @ v

    sdpa = functools.partial(scaled_dot_product_attention, q, k, v, is_causal=causal)
    entries = [entry("SDPA, no drop", None, sdpa)]
    for rate in rates:
        for pattern in ("column", "element") if rate else ("column",):
            call = functools.partial(
                dropkey_attention, q, k, v, dropout_p=rate, pattern=pattern, is_causal=causal, seed=_SEED
            )
            entries.append(entry(f"lorasp {pattern}", rate, call))
        if rate in (0.1, 0.3):
            keep = kept(rate)
            entries.append(entry("SDPA, mask", rate, functools.partial(scaled_dot_product_attention, q, k, v, keep)))
            entries.append(entry("logits, masked_fill, softmax", rate, functools.partial(eager, keep)))
    return entries


def _hidden_cut(sizes, dtype, device, rates, causal) -> list[Entry]:
    torch.manual_seed(_SEED)
    x, residual = (_normal(*sizes, dtype=dtype, device=device).requires_grad_() for _ in range(2))
    entry = functools.partial(_entry, inputs=(x, residual), gradient=_normal(*sizes, dtype=dtype, device=device))
    dropout = nn.Dropout(0.1)
    entries = [entry("nn.Dropout + residual", 0.1, lambda: dropout(x) + residual)]
    for pattern in ("element", "column", "span"):
        call = functools.partial(hidden_cut, x, 0.1, pattern=pattern, residual=residual, seed=_SEED)
        entries.append(entry(f"lorasp {pattern}", 0.1, call))
    return entries


def _consistency(sizes, dtype, device, rates, causal) -> list[Entry]:
    torch.manual_seed(_SEED)
    logits, other = (_normal(*sizes, dtype=dtype, device=device).requires_grad_() for _ in range(2))

    def formula() -> Tensor:
        p, q = log_softmax(logits.float(), -1), log_softmax(other.float(), -1)
        divergence = functools.partial(kl_div, reduction="batchmean", log_target=True)
        return (divergence(p, q) + divergence(q, p)) / 2

    entry = functools.partial(_entry, rate=None, inputs=(logits, other), gradient=None)
    return [
        entry("PyTorch formula", forward=formula),
        entry("lorasp", forward=functools.partial(consistency_loss, logits, other)),
    ]

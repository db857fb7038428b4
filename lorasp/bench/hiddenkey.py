"""What `lorasp bench --op dropkey_attention|hidden_cut|consistency` times: HiddenKey's operators against PyTorch's.

Per shape one contest: forward and backward of every entry, each sample divided by the mean of the base's before and
after it (timing.interleave). Bases: scaled_dot_product_attention without any drop (causal to causal; attention.py);
nn.Dropout and a residual add; the KL formula written in PyTorch. Entries are checked by lorasp.testing first, on a
shape of that kind.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from lorasp import testing
from lorasp.bench import attention
from lorasp.bench.attention import SEED
from lorasp.bench.entries import Entry, normal
from lorasp.bench.entries import entry as make_entry
from lorasp.bench.timing import interleave, make_clock, spread
from lorasp.bench.verify import verify_case
from lorasp.functional import consistency_loss, hidden_cut
from lorasp.memory import saved_bytes

# What a shape's numbers are, per operator, and the ones that are measured without any given.
SIZES = {
    "dropkey_attention": ("B,H,S,D", attention.CPU_SHAPES),
    "hidden_cut": ("B,S,F", ((4, 512, 768), (1, 2048, 4096))),
    "consistency": ("M,V", ((2048, 32000),)),
}
RATES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)


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
    unavailable: dict[str, str] = field(default_factory=dict)

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
    """Check, build and time; yields one Contest per shape. Raises AssertionError if a kernel is wrong.

    Without shapes, those of SIZES; attention on CUDA: of attention.CUDA_SHAPES, causal and, unless `causal`, not.
    """
    device = torch.device(device)
    for sizes, is_causal in _calls(op, shapes, device, causal):
        verify(op, sizes, dtype, device)
        contest = Contest(op, tuple(sizes), dtype, is_causal)
        _time(contest, device, rates, rounds, seconds)
        yield contest


def _time(contest: Contest, device: torch.device, rates: Sequence[float], rounds: int | None, seconds: float) -> None:
    """Fills in the rows; in a function of its own, so that its tensors are freed before the next ones are made."""
    call = contest.sizes, contest.dtype, device
    if contest.op == "dropkey_attention":
        entries, contest.unavailable = attention.entries(*call, rates, contest.causal, backends=device.type == "cuda")
    else:
        entries = {"hidden_cut": _hidden_cut, "consistency": _consistency}[contest.op](*call)
    steps = [entry.step for entry in entries]
    samples = interleave(steps[0], steps, make_clock(device), rounds, seconds)
    for entry, sample in zip(entries, samples, strict=True):
        timed = spread(sample)
        contest.rows.append(
            Row(
                contest.op, contest.sizes, str(contest.dtype).removeprefix("torch."), contest.causal, entry.name,
                entry.rate, len(sample), *(timed[name] for name in ("ms", "ratio", "ratio_q1", "ratio_q3")),
                saved_bytes(entry.forward),
            )
        )  # fmt: skip


def _calls(op, shapes, device, causal) -> list[tuple[tuple[int, ...], bool]]:
    if shapes or op != "dropkey_attention" or device.type != "cuda":
        return [(sizes, causal) for sizes in shapes or SIZES[op][1]]
    return [(sizes, flag) for sizes in attention.CUDA_SHAPES for flag in ((True,) if causal else (False, True))]


def verify(op: str, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """lorasp.testing's comparison at these sizes, the long ones cut to what an fp64 reference takes seconds for."""
    operator = testing.OPERATORS[op]
    if op == "dropkey_attention":
        _, h, s, d = sizes
        shape = (1, min(h, 2), min(h, 2), min(s, 256), min(s, 256), d, d)
    else:
        shape = (*(min(size, 64) for size in sizes[:-1]), sizes[-1])
    for case in operator.cases([shape], [dtype]):
        verify_case(operator, case, device)


def _hidden_cut(sizes, dtype, device) -> list[Entry]:
    torch.manual_seed(SEED)
    x, residual = (normal(*sizes, dtype=dtype, device=device).requires_grad_() for _ in range(2))
    entry = functools.partial(make_entry, inputs=(x, residual), gradient=normal(*sizes, dtype=dtype, device=device))
    dropout = nn.Dropout(0.1)
    entries = [entry("nn.Dropout + residual", 0.1, lambda: dropout(x) + residual)]
    for pattern in ("element", "column", "span"):
        call = functools.partial(hidden_cut, x, 0.1, pattern=pattern, residual=residual, seed=SEED)
        entries.append(entry(f"lorasp {pattern}", 0.1, call))
    return entries


def _consistency(sizes, dtype, device) -> list[Entry]:
    torch.manual_seed(SEED)
    logits, other = (normal(*sizes, dtype=dtype, device=device).requires_grad_() for _ in range(2))

    def formula() -> Tensor:
        p, q = log_softmax(logits.float(), -1), log_softmax(other.float(), -1)
        divergence = functools.partial(kl_div, reduction="batchmean", log_target=True)
        return (divergence(p, q) + divergence(q, p)) / 2

    entry = functools.partial(make_entry, rate=None, inputs=(logits, other), gradient=None)
    return [
        entry("PyTorch formula", forward=formula),
        entry("lorasp", forward=functools.partial(consistency_loss, logits, other)),
    ]

"""The bounds this project set itself, to be shown beside the figures they speak about."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorasp.bench.cases import MODES, Provider


@dataclass(frozen=True)
class Target:
    """What was measured of `name` against its upper bound."""

    name: str
    what: str
    value: float
    bound: float

    @property
    def met(self) -> bool:
        return self.value <= self.bound

    def __str__(self) -> str:
        return f"{self.name}: {self.what}: {self.value:.4f} (target {self.bound:g}: {'met' if self.met else 'MISSED'})"


_TO_FROZEN = "forward + backward over the frozen nn.Linear"
_TO_PEERS = "forward + backward over the fastest of PEFT tuned, PEFT compiled and ATen by hand"
_PEERS = ("peft-half", "peft-half-compile", "aten")
_OVER_PEERS = 1.02
# One H200, bf16: (M, K, N, R), whether there is dropout (0.1), layers that read one x, provider, bound.
_LINEAR = (
    ((8192, 4096, 4096, 16), False, 1, "lorasp+fa", 1.09),
    ((8192, 4096, 4096, 16), False, 1, "lorasp", 1.12),
    ((8192, 4096, 4096, 16), True, 1, "lorasp", 1.17),
    ((8192, 4096, 4096, 16), False, 3, "lorasp+fa+shared", 1.07),
    ((8192, 4096, 14336, 16), False, 1, "lorasp", 1.07),
    ((8192, 4096, 4096, 64), False, 1, "lorasp+fa", 1.12),
    ((8192, 4096, 4096, 64), False, 1, "lorasp", 1.15),
    ((8192, 4096, 4096, 64), True, 1, "lorasp", 1.20),
)


def of_linear(measurements: Sequence, device: torch.device) -> list[Target]:
    """The targets that lorasp.bench's Measurements of one shape speak about: set for bf16 on a GPU, none elsewhere.

    lorasp's own choice of backend and plan counts, not a forced one.
    """
    ratios = {m.provider: m.ratio for m in measurements if m.mode == MODES[0]}
    if device.type != "cuda" or not ratios or measurements[0].dtype != "bfloat16":
        return []
    shape, dropout = measurements[0].shape, measurements[0].dropout_p
    here = (shape.M, shape.K, shape.N, shape.R), dropout > 0, shape.members
    found = [
        Target(name, _TO_FROZEN, ratios[provider], bound)
        for *key, name, bound in _LINEAR
        if tuple(key) == here and (provider := Provider.parse(name)) in ratios
    ]
    for flag in ("", "+fa"):
        ours = Provider.parse(f"lorasp{flag}")
        peers = [ratios[peer] for peer in (Provider.parse(kind + flag) for kind in _PEERS) if peer in ratios]
        if ours in ratios and peers:
            found.append(Target(ours.name, _TO_PEERS, ratios[ours] / min(peers), _OVER_PEERS))
    return found

"""A bound that this project set itself, beside what was measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    variant: str
    what: str
    value: float
    bound: float

    def __str__(self) -> str:
        verdict = "met" if self.value <= self.bound else "MISSED"
        return f"{self.variant}: {self.what}: {self.value:.4f} (target {self.bound:g}: {verdict})"

"""`lorasp tune`: plans and tiles measured on the GPU it runs on, kept in that GPU's plan table.

Rules: right by lorasp.testing's tolerance before anything is timed, on the call itself and, before it is chosen, on a
small one with tails and twice the rank; interleaved with the frozen nn.Linear, L2 overwritten before every call; addmm
stays unless another plan is faster by more than the noise. search.py decides, device.py measures, table.py writes,
command.py talks.
"""

from lorasp.tune.search import (
    Bench,
    DeviceLost,
    Job,
    Outcome,
    Rejected,
    Timing,
    candidates,
    decide,
    describe,
    neighbour,
    run,
)
from lorasp.tune.table import PlanFile

__all__ = [
    "Bench",
    "DeviceLost",
    "Job",
    "Outcome",
    "PlanFile",
    "Rejected",
    "Timing",
    "candidates",
    "decide",
    "describe",
    "neighbour",
    "run",
]

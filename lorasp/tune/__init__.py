"""`lorasp tune`: plans and tiles measured on the GPU it runs on, kept in that GPU's plan table.

Rules: right by lorasp.testing's tolerance before anything is timed, on the call itself and, before it is chosen, on a
small one with tails; interleaved with the base (the frozen nn.Linear, or a kernel's own tiles), L2 overwritten before
every call; addmm, or a kernel's own tiles, stay unless something else is faster by more than the noise. jobs/ says what
is measured, search.py decides, device.py measures on operands/, table.py writes, command.py talks.
"""

from lorasp.tune.search import Bench, DeviceLost, Job, Outcome, Rejected, Timing, decide, run
from lorasp.tune.table import PlanFile

__all__ = ["Bench", "DeviceLost", "Job", "Outcome", "PlanFile", "Rejected", "Timing", "decide", "run"]

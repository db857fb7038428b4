"""A variant of a model in a process of its own: what that keeps, nothing else has taken."""

import json
import subprocess
import sys
from pathlib import Path

import torch


def ask(
    model: str, variant: str, dtype: torch.dtype, device: torch.device, dropout_p: float, checkpointing: bool = False
) -> dict:
    """What `lorasp bench --child` says: model_memory.measure(). Raises RuntimeError with what it wrote if it fails."""
    command = [
        sys.executable, "-m", "lorasp", "bench", "--model", model, "--child", variant, "--dropout", str(dropout_p),
        "--dtype", str(dtype).removeprefix("torch."), "--device", str(device), "--threads",
        str(torch.get_num_threads()), *["--checkpointing"] * checkpointing,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"bench: {' '.join(command[1:])} failed: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_resident() -> int:
    """The most bytes this program had resident, on Linux.

    VmHWM, not getrusage's ru_maxrss: that one starts at the size of whoever started this process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

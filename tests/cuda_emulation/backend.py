"""Backend cuda on CPU tensors: the operators of csrc/cuda/*.cu on the emulator, chosen as on a GPU."""

import pytest
from cuda_emulation.library import load

from lorasp.ops import registry

ORDERS = {0: "ascending", 1: "descending", 7: "shuffled"}


def emulate(monkeypatch: pytest.MonkeyPatch, *operators: str) -> None:
    """Backend cuda is there and has these raw operators."""
    load("kernels", torch_too=True)
    available, unsupported = registry.available_backends(), registry.unsupported
    monkeypatch.setattr(registry, "available_backends", lambda: available | {"cuda": None})
    monkeypatch.setattr(registry, "unsupported", lambda b, *rest: None if b == "cuda" else unsupported(b, *rest))
    monkeypatch.setitem(registry._compiled, "cuda", set(operators))


def require_gpu_build() -> None:
    """Skip the test unless backend cuda runs on this machine's GPU."""
    reason = registry.available_backends()["cuda"]
    if reason is not None:
        pytest.skip(reason)

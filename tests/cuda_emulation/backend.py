"""What tests of backend cuda share: block orders of the emulator, and whether the real backend runs here."""

import pytest

from lorasp.ops import registry

ORDERS = {0: "ascending", 1: "descending", 7: "shuffled"}


def require_gpu_build() -> None:
    """Skip the test unless backend cuda runs on this machine's GPU."""
    reason = registry.available_backends()["cuda"]
    if reason is not None:
        pytest.skip(reason)

import contextlib
import json
import os
import sys

import pytest

# Two cores and two pytest workers: a second OpenMP thread per worker would only fight for a core, spinning. Nothing is
# set for the process that starts the workers: they would inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch

with contextlib.suppress(ImportError):  # only some tests need it
    from hypothesis import settings

    # The rule allows twice the plain computation's own error, which for outputs of very few elements is luck: every run
    # tries the same examples, and stores none. --hypothesis-profile=default explores.
    settings.register_profile("default", deadline=None)
    settings.register_profile("lorasp", deadline=None, derandomize=True, database=None)
    settings.load_profile("lorasp")


def pytest_collection_modifyitems(items):
    # Whole sessions or compilers in one test: begun last, they would leave the other worker without work.
    items.sort(key=lambda item: not item.name.startswith(("test_interpreted", "test_nvcc")))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def as_if_alone():
    """A test depends on no test its process ran before: on what they drew, or how often Dynamo recompiled for them."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


_ended_groups = []


@pytest.fixture
def process_group():
    """This process alone, as torch.distributed's default group."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    # gloo's destructor waits for its threads and holds the GIL, for which one of them may wait, as it does where a
    # collective's last reference is its own. At the end of the process none has anything left to do.
    _ended_groups.extend(distributed.distributed_c10d._world.pg_map)
    distributed.destroy_process_group()


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN: whoever reads memory before writing it is found out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def table_folder(tmp_path, monkeypatch):
    """Where plan tables are read from and written to: an empty one, but for the default."""
    from lorasp.triton_kernels import tuning

    monkeypatch.setattr(tuning, "_CONFIG_DIR", tmp_path)
    (tmp_path / "default.json").write_text(
        json.dumps({"device": "default", "measured": False, "provenance": {}, "rows": []}
                   | {"default": {"forward": "addmm", "backward": "addmm"}})
    )  # fmt: skip
    tuning.forget_tables()
    yield tmp_path
    tuning.forget_tables()


@pytest.fixture
def emulated(monkeypatch, poisoned_memory):
    """Backend cuda takes CPU tensors, and torch.empty holds NaN: csrc/cuda/*.cu built over tests/cuda_emulation."""
    from cuda_emulation.library import load

    from lorasp.ops import registry

    load("kernels", torch_too=True)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lorasp::")]
    compiled = {
        name[len("lorasp::") : -len("_cuda")] for name in names if name.endswith("_cuda") and has_kernel(name, "CPU")
    }
    available, unsupported = registry.available_backends(), registry.unsupported
    monkeypatch.setattr(registry, "available_backends", lambda: available | {"cuda": None})
    monkeypatch.setattr(registry, "unsupported", lambda b, *rest: None if b == "cuda" else unsupported(b, *rest))
    monkeypatch.setitem(registry._compiled, "cuda", compiled)


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request):
    """A backend that computes on this machine's GPU, each in its turn."""
    from lorasp.ops import registry

    reason = registry.available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param

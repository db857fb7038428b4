"""Runs a Python program on the idle GPU: a CUDA build of torch sees one H200 that computes nothing.

    python tests/idle_gpu/run.py -m pytest -m gpu tests
    python tests/idle_gpu/run.py -m lorasp bench --device cuda --shapes small --rounds 1
    python tests/idle_gpu/run.py program.py ...

For a machine without a GPU: everything on the host's side of a GPU program runs. What is checked stands at the top of
cudart.cpp, memory.cpp, streams.cpp and driver.cpp; what was computed is not judged (plugin.py), and no time means
anything. IDLE_GPU_MEMORY: GiB of the device, default half of what the host has free, to be divided by the number of
processes; IDLE_GPU_TRACE=1: every launch on stderr. Triton and Inductor get caches of their own under build/.
Needs torch built for CUDA 13 with its libraries, CUDA's headers and a C++ compiler.
"""

import atexit
import os
import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
INSIDE = "IDLE_GPU_LIBRARIES"
NOTICE = "idle GPU: nothing is computed; no value and no time of this run is a GPU's, no comparison counts"


def environment(libraries: Path) -> dict[str, str]:
    """This process's, with the stand-ins before the libraries that torch brings."""
    from idle_gpu.build import FOLDER, LIBRARIES

    def before(name: str, first: str, separator: str = ":") -> str:
        return separator.join(filter(None, (first, os.environ.get(name))))

    caches = {"TRITON_CACHE_DIR": str(FOLDER / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "inductor")}
    return {**caches, **os.environ} | {
        INSIDE: str(libraries),
        "LD_PRELOAD": before("LD_PRELOAD", ":".join(str(libraries / name) for name in LIBRARIES)),
        "LD_LIBRARY_PATH": before("LD_LIBRARY_PATH", str(libraries)),
        "TRITON_LIBCUDA_PATH": str(libraries),
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",  # cuDNN does not start here, and torch would take its attention first
        "PYTEST_PLUGINS": before("PYTEST_PLUGINS", "idle_gpu.plugin", ","),
        "PYTHONPATH": before("PYTHONPATH", str(TESTS)),
    }


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments == ["-m"]:
        sys.exit(__doc__)
    sys.path[0] = str(TESTS)
    if INSIDE not in os.environ:
        import torch
        from idle_gpu import build

        if (torch.version.cuda or "").partition(".")[0] != str(build.MAJOR):
            sys.exit(f"idle GPU: needs a torch built for CUDA {build.MAJOR}, this one is for {torch.version.cuda}")
        try:
            libraries = build.build()
        except build.Unbuildable as reason:
            sys.exit(f"idle GPU: {reason}")
        print(NOTICE, file=sys.stderr, flush=True)
        os.execve(sys.executable, [sys.executable, __file__, *arguments], environment(libraries))
    from idle_gpu.plugin import judge_shapes_only

    judge_shapes_only()
    atexit.register(print, NOTICE, file=sys.stderr)
    if arguments[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()

"""Builds the CUDA kernels for the CPU and loads them: csrc/cuda/*.cuh over this directory's emulator, for ctypes."""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FLAGS = ("-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-shared", "-fPIC")
TORCH = Path(torch.__file__).parent
TORCH_FLAGS = (f"-isystem{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-ltorch_cpu")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class EmulationError(Exception):
    """A kernel did what hardware leaves undefined: the emulator's message says which thread and what."""


def compiler() -> str | None:
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("c++") or shutil.which("g++")


def load(name: str, *patches: tuple[str, str, str], torch_too: bool = False) -> ctypes.CDLL:
    """The library of tests/cuda_emulation/<name>.cpp, built once per state of the sources.

    torch_too: with torch's headers and libraries. patches: (file of csrc/cuda, text, replacement), faults planted in a
    copy of the sources; text occurs there once.
    Skips the test where there is no C++ compiler.
    """
    found = compiler()
    if found is None:
        pytest.skip("no C++ compiler: the emulated kernels cannot be built")
    if os.uname().sysname != "Linux":
        pytest.skip("the emulator's fibers are written for Linux")
    sources = sorted([*HERE.glob("*.h"), HERE / f"{name}.cpp", *ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*")])
    flags = [*FLAGS, *(TORCH_FLAGS if torch_too else ())]
    state = hashlib.sha256(repr((found, flags, patches, torch.__version__)).encode())
    for source in sources:
        state.update(source.read_bytes())
    library = ROOT / "build" / "cuda_emulation" / f"{name}-{state.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with library.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's workers build each library once
            if not library.exists():
                build(found, flags, name, patches, library)
    return ctypes.CDLL(str(library))


def build(compiler: str, flags: list[str], name: str, patches: tuple, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        copy = Path(folder) / "csrc"
        shutil.copytree(ROOT / "csrc", copy, ignore=shutil.ignore_patterns("cpu", "*.cpp"))
        for file, text, replacement in patches:
            content = (copy / "cuda" / file).read_text()
            assert content.count(text) == 1, f"{file}: {text!r} occurs {content.count(text)} times"
            (copy / "cuda" / file).write_text(content.replace(text, replacement))
        built = Path(folder) / "library.so"
        folders = [f"-I{copy / 'cuda'}", f"-I{HERE}"]
        command = [compiler, *folders, str(HERE / f"{name}.cpp"), "-o", str(built), *flags]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        built.replace(library)


def call(function, *arguments) -> None:
    """Run an emulated launcher; raises EmulationError with the emulator's message."""
    function.restype = ctypes.c_char_p
    message = function(*arguments)
    if message is not None:
        raise EmulationError(message.decode())


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

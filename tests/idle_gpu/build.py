"""Builds the stand-ins for CUDA's libraries out of this folder's C++, under their names and symbol versions."""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / "build" / "idle_gpu"
MAJOR = 13
NOT_SUPPORTED = 801  # cudaErrorNotSupported, CUDA_ERROR_NOT_SUPPORTED
# Library: its sources, and what a function returns that they do not write. Later ones are linked to the first.
LIBRARIES = {
    f"libcudart.so.{MAJOR}": (("cudart", "memory", "streams"), NOT_SUPPORTED),
    "libcuda.so.1": (("driver",), NOT_SUPPORTED),
    f"libcublasLt.so.{MAJOR}": (("cublas",), 0),
    f"libcublas.so.{MAJOR}": (("cublas",), 0),
}
PRODUCT = re.compile(r"gemm|gemv|Matmul$", re.IGNORECASE)


class Unbuildable(Exception):
    """The stand-ins cannot be built here; the message says what is missing."""


def roots() -> list[Path]:
    """Where CUDA may lie: a toolkit, then the packages that pip brings with torch."""
    found = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    nvcc = shutil.which("nvcc")
    if nvcc:  # which may be a script in another folder
        command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
        top = re.search(r"^#\$ TOP=(.+)$", subprocess.run(command, capture_output=True, text=True).stderr, re.MULTILINE)
        found += [Path(top[1])] if top else []
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages and packages.submodule_search_locations) or ():
        found += sorted(path for path in Path(folder).iterdir() if path.is_dir())
    return found


def headers() -> list[Path]:
    """Folders with the headers of CUDA 13. Raises Unbuildable where there are none."""
    found = [root / "include" for root in roots()]
    runtime = [folder for folder in found if _version(folder / "cuda_runtime_api.h") == MAJOR]
    # pip's cuda-runtime lacks crt/, which comes with nvcc.
    compilers = [folder for folder in found if (folder / "crt" / "host_defines.h").exists()]
    if not runtime or not compilers:
        raise Unbuildable(f"no headers of CUDA {MAJOR}: not in CUDA_HOME, beside nvcc or in pip's nvidia packages")
    return list(dict.fromkeys([runtime[0], *compilers]))


def _version(header: Path) -> int | None:
    found = header.exists() and re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text())
    return int(found[1]) // 1000 if found else None


def real_library(name: str) -> Path | None:
    """The library whose place a stand-in takes."""
    places = [root / sub for root in roots() for sub in ("lib", "lib64", "targets/x86_64-linux/lib")]
    return next((place / name for place in places if (place / name).exists()), None)


def functions(library: Path, *options: str) -> set[str]:
    """The functions an object file or library defines."""
    listing = subprocess.run(["nm", "--defined-only", *options, library], capture_output=True, text=True, check=True)
    lines = (line.split() for line in listing.stdout.splitlines())
    names = {words[2].partition("@")[0] for words in lines if len(words) == 3 and words[1] in "TWV"}
    return names - {"_init", "_fini"}


def driver_functions(compiler: str, includes: list[str]) -> set[str]:
    """Every function cuda.h declares: the real libcuda.so.1 comes with a driver, which is not here."""
    command = [compiler, "-E", *includes, "-include", "cuda.h", "-x", "c++", os.devnull]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\bCUresult\s+(cu\w+)\s*\(", text))


def stubs(names: set[str], result: int) -> str:
    count = "extern void idle_gpu_count_product(void);\n"
    bodies = {name: "idle_gpu_count_product(); " if result == 0 and PRODUCT.search(name) else "" for name in names}
    return count + "".join(f"long {name}(void) {{ {body}return {result}; }}\n" for name, body in sorted(bodies.items()))


def build(everything: bool = True) -> Path:
    """The folder of the stand-ins, built once per state of the sources.

    everything: Unbuildable where a library to stand in for is not found; else it is left out. Raises Unbuildable also
    without a C++ compiler or without CUDA's headers.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise Unbuildable("no C++ compiler")
    includes = [f"-I{folder}" for folder in headers()]
    real = {name: real_library(name) for name in LIBRARIES if name != "libcuda.so.1"}
    missing = [name for name, path in real.items() if path is None]
    if missing and everything:
        raise Unbuildable(f"{', '.join(missing)}: not where CUDA_HOME, nvcc or pip's nvidia packages are")
    state = hashlib.sha256(repr((compiler, includes, real)).encode())
    for source in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h"), Path(__file__)]):
        state.update(source.read_bytes())
    folder = FOLDER / state.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in LIBRARIES:
            if name not in missing and not (folder / name).exists():
                _build_library(name, real.get(name), compiler, includes, folder)
    return folder


def _build_library(name: str, real: Path | None, compiler: str, includes: list[str], folder: Path) -> None:
    sources, result = LIBRARIES[name]
    objects = [folder / f"{source}.o" for source in sources]
    flags = ["-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Werror"]
    for source, built in zip(sources, objects, strict=True):
        _run(compiler, *flags, *includes, "-c", HERE / f"{source}.cpp", "-o", built)
    own = set().union(*map(functions, objects))
    wanted = functions(real, "-D") if real else driver_functions(compiler, includes)
    written, script = folder / f"{name}.c", folder / f"{name}.version"
    written.write_text(stubs(wanted - own, result))
    # torch asks for `cudaMalloc@libcudart.so.13`; the driver's symbols have no version.
    script.write_text(f"{name} {{ global: *; }};\n" if real else "{ global: *; };\n")
    _run(compiler, "-x", "c", "-w", "-fPIC", "-c", written, "-o", f"{written}.o")
    first = next(iter(LIBRARIES))
    link = [] if name == first else [f"-L{folder}", f"-l:{first}", "-Wl,-rpath,$ORIGIN"]
    naming = [f"-Wl,-soname,{name}", f"-Wl,--version-script={script}"]
    partial = folder / f"{name}.partial"
    _run(compiler, "-shared", *naming, *objects, f"{written}.o", "-o", partial, *link, "-ldl", "-pthread")
    partial.replace(folder / name)


def _run(*command) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        raise Unbuildable(f"{' '.join(map(str, command))}\n{done.stderr}")

"""Builds the C++ (and, beside nvcc, CUDA) extension `lorasp._C`; metadata lives in pyproject.toml.

Without torch in the build environment or without a C++ compiler the package installs as pure Python and its reference
backend is in charge (`python -m lorasp info` says so). A compiler whose build fails stops the installation.
"""

import os
import shutil
import sys
from glob import glob

from setuptools import find_packages, setup


def extensions():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        print("lorasp: torch is not importable here: installing without the C++ extension", file=sys.stderr)
        return [], {}
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None and (os.environ.get("CXX") or shutil.which("g++") is None):
        print(f"lorasp: no C++ compiler ({compiler}): installing without the C++ extension", file=sys.stderr)
        return [], {}
    sources = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/**/*.cpp", recursive=True))
    # -fopenmp at compile time only: the runtime must be the one libtorch_cpu already loads.
    flags = {"cxx": ["-O3", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]}
    # Python's own flags ask for debug information: fifteen times the library, a quarter more time.
    if "-g" not in os.environ.get("CFLAGS", "").split():
        flags["cxx"].append("-g0")
    kind, macros = cpp_extension.CppExtension, []
    # CUDA sources are compiled where nvcc and a CUDA build of torch meet, whether or not a GPU is present.
    cuda_sources = sorted(glob("csrc/cuda/*.cu"))
    if cuda_sources and cpp_extension.CUDA_HOME and torch.version.cuda:
        newer = ";10.0;12.0" if tuple(map(int, torch.version.cuda.split(".")[:2])) >= (12, 8) else ""
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0;9.0{newer}+PTX")
        kind, macros, sources = cpp_extension.CUDAExtension, [("LORASP_CUDA", None)], sources + cuda_sources
        flags["nvcc"] = ["-O3"]
    extension = kind(
        "lorasp._C",
        sources,
        # What a source distribution carries beside the sources.
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/cuda/*.cu*")),
        include_dirs=[os.path.join(os.path.dirname(os.path.abspath(__file__)), "csrc")],
        define_macros=macros,
        extra_compile_args=flags,
    )
    return [extension], {"build_ext": cpp_extension.BuildExtension}


ext_modules, cmdclass = extensions()
setup(
    packages=[*find_packages(include=["lorasp", "lorasp.*"]), "lorasp.triton_kernels"],
    package_dir={"lorasp.triton_kernels": "triton_kernels"},
    package_data={"lorasp.triton_kernels": ["configs/*.json"]},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)

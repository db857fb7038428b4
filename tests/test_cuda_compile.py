"""Every CUDA source compiled by nvcc, without a GPU, for every architecture it is meant for: what ptxas says of it."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
SOURCES = sorted(file.name for file in CUDA.glob("*.cu"))
ARCHITECTURES = (80, 90, 100, 120)
TORCH = Path(torch.__file__).parent
REGISTERS_PER_BLOCK = 65536  # of every architecture, "Technical Specifications per Compute Capability"
THREADS = 256  # kThreads
BLOCKS_PER_MULTIPROCESSOR = 2  # what split_sum counts on

KERNELS = {
    "consistency_backward_kernel", "consistency_forward_kernel", "consistency_merge_kernel",
    "dropkey_attention_keys_kernel", "hidden_cut_kernel", "lora_linear_accumulate_kernel", "lora_linear_factor_kernel",
    "lora_linear_outer_kernel", "lora_linear_positions_kernel", "lora_linear_project_kernel",
    "lora_linear_reduce_kernel", "partial_adamw_count_kernel", "partial_adamw_kernel",
}  # fmt: skip


def find_nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    return next(filter(None, (shutil.which("nvcc", path=f"{home}/bin") for home in homes)), shutil.which("nvcc"))


NVCC = find_nvcc()
if NVCC is None:
    pytest.skip("nvcc is not on the path and CUDA_HOME is not set", allow_module_level=True)


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: int
    stack: int
    spilled: int
    registers: int
    static_shared: int


def test_nvcc_compiles(tmp_path):
    """All sources as one, so that torch's headers, most of the work, are read once for each architecture. Warnings are
    errors."""
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    missing = [f"sm_{arch}" for arch in ARCHITECTURES if f"sm_{arch}" not in known]
    if missing:
        pytest.skip(f"this nvcc does not know {', '.join(missing)}")
    whole, built = tmp_path / "whole.cu", tmp_path / "whole.o"
    whole.write_text("".join(f'#include "{source}"\n' for source in SOURCES))
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = [
        NVCC, "-std=c++17", "-O3", "-Werror", "all-warnings", "-isystem", TORCH / "include", "-I", CUDA, *targets,
        "-Xptxas", "-v", "-Xcompiler", "-fPIC", "-c", whole, "-o", built,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = list(kernels(result.stdout + result.stderr))
    for arch in ARCHITECTURES:
        assert {kernel.name for kernel in found if kernel.arch == arch} == KERNELS
    for kernel in found:
        assert_resources_suffice(kernel)
    assert_asks_only_for_the_stable_abi(built)
    code = machine_code(built)
    assert {name_of(mangled) for mangled in code} == KERNELS
    linear = {name: text for name, text in code.items() if "lora_linear" in name}
    assert_uses_tensor_cores(linear)
    assert_moves_16_bytes_at_a_time({name: text for name, text in code.items() if name not in linear})


def test_nvcc_compiles_launch_alone(tmp_path):
    """The one source the emulator has no use for: test_cuda_emulation.py compiles every other one alone."""
    command = [NVCC, "-std=c++17", "-isystem", TORCH / "include", "-c", CUDA / "launch.cu", "-o", tmp_path / "launch.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def kernels(log):
    """What `ptxas -v` says, one block of lines per kernel and architecture."""
    for block in log.split("Compiling entry function ")[1:]:
        mangled, arch = re.match(r"'(\w+)' for 'sm_(\d+)\w*'", block).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        ).groups()
        used = re.search(r"Used (\d+) registers(.*)", block)
        shared = re.search(r"(\d+) bytes smem", used[2])
        spilled, static_shared = int(stores) + int(loads), int(shared[1]) if shared else 0
        yield Kernel(name_of(mangled), int(arch), int(stack), spilled, int(used[1]), static_shared)


def name_of(mangled):
    return re.search(r"\d+([a-z][a-z_]*_kernel)", mangled)[1]


def assert_resources_suffice(kernel):
    """No spills, two blocks per multiprocessor. Dynamic shared memory, all there is, is asserted by kSharedLimit."""
    assert (kernel.stack, kernel.spilled, kernel.static_shared) == (0, 0, 0), kernel
    assert kernel.registers * THREADS * BLOCKS_PER_MULTIPROCESSOR <= REGISTERS_PER_BLOCK, kernel


def test_shared_memory_is_below_every_architecture_s_limit():
    tiles = (CUDA / "tile.cuh").read_text()
    limit = int(re.search(r"constexpr int kSharedLimit = (\d+);", tiles)[1])
    assert limit == 101376  # sm_120's, the smallest
    for file in CUDA.glob("*.cuh"):
        text = file.read_text()
        assert text.count("static constexpr int kSharedBytes") == text.count(
            "static_assert(kSharedBytes <= kSharedLimit)"
        )


def assert_asks_only_for_the_stable_abi(built):
    """No C++ symbol of torch: what is built for one torch loads in the next. Its C functions exist in this torch."""
    listing = subprocess.run(["nm", "-u", built], capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1] for line in listing.splitlines() if line.strip()}
    assert not [name for name in symbols if re.match(r"_ZN?K?(2at|3c10|5torch)", name)]
    library = ctypes.CDLL(str(TORCH / "lib" / "libtorch_cpu.so"))
    needed = {name for name in symbols if re.match(r"(aoti_)?torch_", name)}
    only_in_cuda_builds = {"aoti_torch_cuda_addmm_out", "aoti_torch_get_current_cuda_stream"}
    assert not [name for name in needed - only_in_cuda_builds if not hasattr(library, name)]


def machine_code(built):
    """Mangled name -> code of every kernel for sm_90."""
    triton = importlib.util.find_spec("triton")
    tool = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = tool if tool and tool.exists() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("compiled, but machine code was not read: neither triton nor the toolkit has brought cuobjdump")
    sass = subprocess.run([tool, "-sass", "-arch", "sm_90", built], capture_output=True, text=True, check=True).stdout
    return {code.split()[0]: code for code in sass.split("Function : ")[1:]}


def assert_uses_tensor_cores(found):
    """HMMA (mma.sync), LDSM (ldmatrix), LDGSTS (cp.async), 16-byte accesses."""
    for name, code in found.items():
        half = "bf16" in name or "3f16" in name
        if not any(streaming in name for streaming in ("project", "outer", "accumulate")):
            continue
        assert ("HMMA" in code, "LDSM" in code) == (half, half), name
        assert "LDGSTS.E.BYPASS.128" in code, name
        if "accumulate" in name:
            assert "LDG.E.128" in code, name
            assert "STG.E.128" in code, name


def assert_moves_16_bytes_at_a_time(found):
    """What streams over a tensor; the forward of consistency writes a few numbers a row."""
    for name, code in found.items():
        if any(word in name for word in ("count", "merge", "dropkey")):
            continue
        assert "LDG.E.128" in code, name
        assert "STG.E.128" in code or "consistency_forward" in name, name

"""Every Triton kernel, in every variant its launchers choose, compiled without a GPU for what it is meant for."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton

from lorasp.triton_kernels import launch
from lorasp.triton_kernels.compile_cases import ARCHITECTURES, compile_cases

if launch.INTERPRETED:
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CASES = [case for arch in ARCHITECTURES for case in compile_cases(arch)]
KERNELS = {
    name
    for file in Path(launch.__file__).parent.glob("*.py")
    for name in vars(importlib.import_module(f"lorasp.triton_kernels.{file.stem}"))
    if name.startswith("_") and name.endswith("_kernel")
}
TMA_KERNELS = {
    "_lora_linear_gemm_tma_kernel",
    "_lora_linear_onepass_tma_kernel",
    "_lora_linear_group_gemm_tma_kernel",
}

TENSOR_MEMORY_COLUMNS = 512


def tool(name, *arguments):
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def spilled_loads(cubin, folder):
    """Loads from local memory. Stack alone is no spill: on sm_120 ptxas reserves eight bytes around TMA copies."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    usage = tool("cuobjdump", "--dump-resource-usage", file)
    stack, local = re.search(r"STACK:(\d+).*?LOCAL:(\d+)", usage).groups()
    return 0 if stack == local == "0" else len(re.findall(r"\bLDL\b", tool("nvdisasm", "-c", file)))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_is_compiled_for(arch):
    names = {case.kernel.__name__ for case in CASES}
    assert names == KERNELS
    assert {case.kernel.__name__ for case in CASES if case.target.arch == arch} == names - (
        TMA_KERNELS if arch < 90 else set()
    )


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_compiles_without_spills(case, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    compiled = case.compile()
    assert compiled.metadata.shared <= case.target.shared_memory
    assert compiled.metadata.tmem_size <= TENSOR_MEMORY_COLUMNS
    assert compiled.metadata.global_scratch_size == 0  # it would need an allocator, which is the application's to set
    assert spilled_loads(compiled.asm["cubin"], tmp_path) == 0
    if case.target.arch == 90 and case.kernel.__name__ in TMA_KERNELS:
        assert "wgmma.mma_async" in compiled.asm["ptx"]
        assert "cp.async.bulk.tensor" in compiled.asm["ptx"]


def test_a_launch_must_name_every_argument():
    """The JIT would refuse it on a GPU only, the interpreter never."""
    case = CASES[0]
    arguments = dict.fromkeys((*case.kernel.arg_names, "EXTRA"))
    with launch.record(case.target), pytest.raises(TypeError, match="EXTRA"):
        launch.launch(case.kernel, (1,), arguments, 4, 1)

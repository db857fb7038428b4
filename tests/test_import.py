"""`import lorasp` needs neither triton nor the extension nor a GPU, and imports no heavy friend."""

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1]
ALLOWED = {
    "lorasp/rng.py": set(),
    "lorasp/config.py": set(),
    "lorasp/memory.py": set(),
    "lorasp/sharding.py": set(),
    "lorasp/reference": {"reference", "rng"},
    "lorasp/ops": {"ops", "reference", "triton_kernels"},
    "lorasp/functional": {"functional", "ops", "rng"},
    "lorasp/adapter": {"adapter", "config", "rng", "sharding"},
    "lorasp/optim": {"adapter", "ops", "optim", "sharding"},
    "lorasp/layers": {"adapter", "config", "functional", "layers", "ops", "sharding"},
    "lorasp/nn.py": {"layers"},
    "lorasp/models": {"adapter", "config", "layers", "models", "sharding"},
    "lorasp/files": {"adapter", "config", "files", "layers", "models", "sharding"},
    "lorasp/integrations": {"config", "functional", "integrations", "layers", "models"},
    "triton_kernels": {"triton_kernels"},
}
# Folders of csrc that the files of one folder may include.
CSRC = {
    "cpu": {"cpu/common", "cpu/lora_linear", "cpu/dropkey_attention", "cpu/rows"},  # the operators
    "cpu/lora_linear": {"cpu/lora_linear", "cpu/common"},
    "cpu/dropkey_attention": {"cpu/dropkey_attention", "cpu/common"},
    "cpu/rows": {"cpu/rows", "cpu/common"},
    "cpu/common": {"cpu/common", "."},
}


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_cold_import_touches_no_heavy_module_and_no_gpu():
    result = run("""
        import sys, torch
        import lorasp
        heavy = {"triton", "transformers", "peft", "rich", "matplotlib", "safetensors", "triton_kernels"}
        heavy |= {"bitsandbytes", "torchao"}
        print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized())
    """)
    assert result.stdout.strip() == "[] False", result.stderr


def test_import_and_call_without_triton_and_without_extension():
    result = run("""
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name in ("triton", "lorasp._C") else real(name, *a)
        import torch, lorasp
        x, w = torch.randn(3, 8), torch.randn(4, 8)
        y = lorasp.lora_linear(x, w, torch.randn(2, 8), torch.randn(4, 2))
        print(tuple(y.shape), lorasp.available_backends())
    """)
    assert result.returncode == 0, result.stderr
    assert "(3, 4)" in result.stdout
    assert "'cpp': 'not built" in result.stdout
    assert "'triton': 'triton is not installed'" in result.stdout


def test_broken_extension_is_a_loud_error(tmp_path):
    result = run(f"""
        import importlib.util, importlib
        real_spec, real_import = importlib.util.find_spec, importlib.import_module
        importlib.util.find_spec = lambda name, *a: object() if name == "lorasp._C" else real_spec(name, *a)
        def broken(name, *a):
            if name == "lorasp._C":
                raise ImportError("undefined symbol: _ZN3c10")
            return real_import(name, *a)
        importlib.import_module = broken
        import lorasp
        {tmp_path!r}
    """)
    assert result.returncode != 0
    assert "does not load (undefined symbol" in result.stderr


def imported_rooms(path):
    """Names of lorasp's rooms that one file imports."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lorasp":
            parts = node.module.split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lorasp.")}
    return rooms


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_arrows_run_one_way(room):
    path = PACKAGE / room
    files = [path] if path.suffix == ".py" else sorted(path.glob("*.py"))
    assert files
    for file in files:
        extra = imported_rooms(file) - ALLOWED[room]
        assert not extra, f"{file.relative_to(PACKAGE)} imports {extra}"


def test_arrows_between_the_folders_of_the_cpp_kernels_run_one_way():
    csrc = PACKAGE / "csrc"
    seen = {}
    for file in csrc.glob("cpu/**/*.*"):
        for included in re.findall(r'^ *# *include +"([^"]+)"', file.read_text(), re.MULTILINE):
            target = (file.parent / included).resolve()
            assert target.is_file(), f"{file.relative_to(csrc)} includes {included}"
            seen.setdefault(str(file.parent.relative_to(csrc)), set()).add(str(target.parent.relative_to(csrc)))
    assert seen.keys() == CSRC.keys()
    for folder, included in seen.items():
        extra = included - CSRC[folder]
        assert not extra, f"csrc/{folder} includes files of {extra}"


X86_ONLY = ("defined(__x86_64__)", "defined(LORASP_AVX")  # a target_*.h defines the latter


def x86_headers(file, found):
    """Adds to `found` the headers of x86 that `file` and what it includes read on any other CPU."""
    skipped = []
    for directive, rest in re.findall(
        r"^ *# *(if|ifdef|ifndef|elif|else|endif|include)\b *(.*)", file.read_text(), re.M
    ):
        if directive.startswith("if"):
            skipped.append(rest.startswith(X86_ONLY))
        elif directive in ("elif", "else"):
            skipped[-1] = rest.startswith(X86_ONLY)
        elif directive == "endif":
            skipped.pop()
        elif any(skipped):
            continue
        elif rest.startswith('"'):
            x86_headers(file.parent / rest.strip('"'), found)
        elif rest in ("<immintrin.h>", "<cpuid.h>"):
            found.add(f"{file.name}: {rest}")
    return found


def test_no_file_of_the_cpp_kernels_needs_x86():
    sources = sorted((PACKAGE / "csrc" / "cpu").glob("**/*.cpp"))
    wrong = {source.name: headers for source in sources if (headers := x86_headers(source, set()))}
    assert sources
    assert not wrong

"""What setup.py builds where: CPU sources only, or CUDA sources too, by what nvcc and torch can do together."""

import os
import runpy
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def extension(monkeypatch):
    """The extension that setup.py declares for a torch built with `cuda` and nvcc below `home`."""
    declared = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: declared.update(arguments))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")

    def declare(cuda, home):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
        runpy.run_path("setup.py")
        (only,) = declared["ext_modules"]
        return only

    return declare


@pytest.mark.parametrize(("cuda", "home"), [(None, None), (None, "/usr/local/cuda"), ("13.0", None)])
def test_without_nvcc_or_a_cuda_torch_nothing_of_cuda_is_built(extension, cuda, home):
    built = extension(cuda, home)
    assert built.sources
    assert not [source for source in built.sources if "cuda" in source]
    assert not built.define_macros
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ


def test_every_cpp_source_is_built_and_a_source_distribution_has_all_the_rest(extension):
    built = extension(None, None)
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*.*")}
    sources = {file for file in files if file.endswith(".cpp")}
    assert set(built.sources) == sources
    assert set(built.depends) == files - sources


@pytest.mark.parametrize(
    ("cuda", "architectures"),
    [("12.6", "8.0;9.0+PTX"), ("12.8", "8.0;9.0;10.0;12.0+PTX"), ("13.0", "8.0;9.0;10.0;12.0+PTX")],
)
def test_every_cuda_source_is_built_where_both_are_there(extension, cuda, architectures):
    """Whether or not a GPU is present; architectures as far as that nvcc knows them."""
    built = extension(cuda, "/usr/local/cuda")
    assert {f"csrc/cuda/{file.name}" for file in (ROOT / "csrc" / "cuda").glob("*.cu")} <= set(built.sources)
    assert ("LORASP_CUDA", None) in built.define_macros
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == architectures
    assert cpp_extension._get_cuda_arch_flags()

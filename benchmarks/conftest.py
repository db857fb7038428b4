"""Options of the benchmark suites, and what holds for every one of them."""

import pytest
import torch

from lorasp import bench, cli, info
from lorasp.bench import session, workloads


def pytest_addoption(parser):
    group = parser.getgroup("lorasp")
    group.addoption("--shapes", nargs="+", metavar="SET", help=f"named sets: {', '.join(bench.SHAPES)}")
    group.addoption("--tokens", type=int, help="M of the named sets (default: the set's)")
    group.addoption("--dtype", type=cli.dtype_of, default=torch.bfloat16, help="fp32, bf16 (default), fp16")
    group.addoption("--device", type=cli.device_of, help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    group.addoption("--dropout", type=float, default=0.0, help="lora_dropout of every adapter")
    group.addoption("--providers", nargs="+", metavar="NAME", help="as `python -m lorasp bench --providers`")


def _device(config) -> torch.device:
    return config.getoption("device") or session.default_device()


def pytest_report_header(config):
    device = _device(config)
    return f"lorasp benchmarks: {info.device_name(device)}; {session.timing_rules(device)}"


def pytest_generate_tests(metafunc):
    if "provider" not in metafunc.fixturenames:
        return
    config = metafunc.config
    device = _device(config)
    names = config.getoption("shapes") or ["llama3-8b" if device.type == "cuda" else "square"]
    tokens = config.getoption("tokens")
    shapes = [shape for name in names for shape in bench.SHAPES[name]]
    shapes = bench.distinct(shapes if tokens is None else bench.with_tokens(shapes, tokens))
    chosen = config.getoption("providers")
    providers = (
        workloads.default_providers(device, prepack=device.type == "cpu")
        if chosen is None
        else [bench.Provider.parse(name) for name in chosen]
    )
    metafunc.parametrize("mode", bench.MODES)
    metafunc.parametrize("provider", providers, ids=lambda provider: provider.name)
    metafunc.parametrize("shape", shapes, ids=lambda s: f"{s.name}{s.M}x{s.K}x{s.N}-r{s.R}", scope="module")


@pytest.fixture(scope="module")
def workload(shape, request):
    config = request.config
    return workloads.make_workload(shape, config.getoption("dtype"), _device(config), config.getoption("dropout"))

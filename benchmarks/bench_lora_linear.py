"""lora_linear against nn.Linear and PEFT under pytest-benchmark; ratios, bytes and peaks are in extra_info.

pytest benchmarks/bench_lora_linear.py [--shapes square llama3-8b] [--dtype bf16] [--dropout 0.1] [--device cuda]
"""

from dataclasses import asdict

import pytest
import torch

from lorasp import bench, info
from lorasp.bench import Provider, workloads
from lorasp.bench.timing import make_clock


def test_lora_linear(benchmark, workload, provider, mode):
    shape, device = workload.shape, workload.x.device
    try:
        candidate = workloads.build(provider, workload)
        workloads.verify(candidate)
    except bench.Unavailable as reason:
        pytest.skip(str(reason))
    base = workloads.build(Provider(bench.BASE), workload)
    *_, measurement = bench.measure([base, candidate], mode, make_clock(device), rounds=7)
    function = candidate.step if mode == "forward+backward" else candidate.forward

    def call():
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = f"{shape.label} {mode}"
    with candidate.context():
        benchmark.pedantic(call, warmup_rounds=3, rounds=15, iterations=1)
    facts = {key: value for key, value in asdict(measurement).items() if key not in ("shape", "provider")}
    benchmark.extra_info.update(
        facts,
        **asdict(shape),
        provider=provider.name,
        floor_flops=bench.floor(shape, provider, mode),
        contract_bytes=bench.contract_bytes(shape, provider, workload.x.element_size(), workload.dropout_p),
        device=info.device_name(device),
        **info.versions(),
    )

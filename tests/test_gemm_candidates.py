"""The tiles that `lorasp tune` tries: that they fit where they are meant for, and what they take of shared memory."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lorasp.triton_kernels import launch, lora_linear, tuning
from lorasp.triton_kernels.gemm_candidates import own_tiles, plan_candidates, shared_bytes


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120, 130])
def test_candidates_fit_every_architecture(arch):
    target = tuning.target_of_arch(arch)
    for dtype in (torch.bfloat16, torch.float32):
        for M, N, K, R in ((8192, 4096, 4096, 16), (8192, 4096, 4096, 96), (1, 4096, 4096, 8), (300, 1000, 1001, 8)):
            for direction, dropout in (("forward", False), ("backward", True)):
                found = plan_candidates(target, direction, dtype, dropout, M, N, K, R)
                assert len(found) == len(set(found))
                names = ["addmm", "fused", *["onepass"] * (direction == "forward" and R <= 64)]
                assert [plan.name for plan in found if plan.gemm is None] == names
                assert sum(plan.gemm is not None for plan in found) >= 3
                for plan in found[1:]:
                    own = own_tiles(target, plan.name, direction, dtype, dropout, M, N, K, R)
                    gemm = plan.gemm or own
                    least = shared_bytes(target, gemm, dtype, plan.name, R)
                    assert least <= target.shared_memory
                    assert not gemm.tma or (arch >= 90 and dtype.itemsize == 2)
                    assert plan.gemm != own


@pytest.mark.parametrize(("arch", "index"), [(90, 8), (80, 8)], ids=["sm_90", "sm_80"])
def test_shared_memory_is_bounded_from_below(arch, index, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target, (M, N, K, R) = tuning.target_of_arch(arch), (8192, 4096, 4096, 16)
    plan = plan_candidates(target, "forward", torch.bfloat16, False, M, N, K, R)[2:][index]
    with launch.record(target) as cases:
        x, weight, lora_A, lora_B = (
            torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((M, K), (N, K), (R, K), (N, R))
        )
        lora_linear.forward(x, weight, None, lora_A, lora_B, None, 1.0, 0.0, 0, plan)
    case = cases[-1]
    gemm = dict(case.constants)
    assert (gemm["BLOCK_M"], gemm["BLOCK_C"], gemm["BLOCK_D"]) == (
        plan.gemm.block_m, plan.gemm.block_c, plan.gemm.block_d,
    )  # fmt: skip
    least = shared_bytes(target, plan.gemm, torch.bfloat16, plan.name, R)
    step = 2 * (plan.gemm.block_m + plan.gemm.block_c) * plan.gemm.block_d
    assert least <= case.compile().metadata.shared <= least + step

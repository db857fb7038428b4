"""dropkey_attention on Triton: interpreted everywhere, on hardware where there is a GPU; the choice of tiles."""

import itertools
from dataclasses import replace

import pytest
import torch
from interpreter import run_interpreted

pytest.importorskip("triton", reason="triton is not installed")

from lorasp.ops.dropkey_attention import forward_ops
from lorasp.reference import dropkey_attention as reference
from lorasp.testing import assert_close
from lorasp.testing.dropkey_attention import Case, check_case, make_inputs
from lorasp.triton_kernels import dropkey_attention as kernels
from lorasp.triton_kernels import tuning
from lorasp.triton_kernels.dropkey_attention_tiles import attention_config


def test_interpreted():
    run_interpreted("interpret/dropkey_attention.py")


def test_cpu_tensors_are_refused_where_kernels_are_compiled():
    q = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="dropkey_attention: q must be on a GPU for triton unless TRITON_INTERPRET=1"):
        kernels.forward(q, q, q, None, None, 0.0, "column", False, 1.0)


@pytest.mark.parametrize("kernel", ["forward", "delta", "dq", "dkv", "mask"])
@pytest.mark.parametrize("head_dim", [1, 16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120, 130])
def test_tiles_exist_for_every_architecture(arch, head_dim, kernel):
    target = tuning.target_of_arch(arch)
    for dtype, logits in itertools.product((torch.float32, torch.bfloat16), ("plain", "masked", "ragged")):
        config = attention_config(target, dtype, head_dim, kernel, logits)
        assert min(config.block_m, config.block_n) >= 16
        assert config.num_warps in (4, 8)
        keys = config.block_n * head_dim * dtype.itemsize
        assert 2 * keys * config.num_stages <= target.shared_memory


BIG = Case(2, 8, 8, 1024, 1024, 64, 64)
GPU_CASES = (
    BIG,
    replace(BIG, D=128, Dv=128, dropout_p=0.1, is_causal=True),
    replace(BIG, Hkv=2, D=128, Dv=128, dropout_p=0.1, is_causal=True, mask="padding"),
    replace(BIG, Hkv=1, is_causal=True),
    replace(BIG, dropout_p=0.3, mask="bias"),
    replace(BIG, dropout_p=0.1, pattern="element", mask="bias32", is_causal=True),
    replace(BIG, dropout_p=0.1, pattern="element", D=128, Dv=64),
    replace(BIG, dropout_p=0.3, pattern="span", mask="min"),
    replace(BIG, Sq=1000, Sk=517, D=80, Dv=40, dropout_p=0.1, mask="bool"),
    replace(BIG, Sq=333, Sk=1999, D=20, Dv=7, dropout_p=0.5, is_causal=True),
    replace(BIG, Sq=1, Sk=4001, Hkv=2, dropout_p=0.1, mask="padding"),
    replace(BIG, Sq=300, Sk=300, H=4, Hkv=4, D=256, Dv=256, dropout_p=0.1, is_causal=True),
    replace(BIG, Sq=300, Sk=300, H=4, Hkv=4, D=192, Dv=128, dropout_p=0.1, pattern="element", mask="bias"),
    replace(BIG, B=1, H=2, Hkv=2, Sq=4096, Sk=4096, D=128, Dv=128, dropout_p=0.1, is_causal=True),
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu(case, dtype, poisoned_memory):
    for result in check_case(replace(case, dtype=dtype), "triton", device="cuda"):
        assert result.ok, result


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["column", "element", "span"])
@pytest.mark.parametrize("Sk", [256, 203])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpu_drop_decisions_are_the_definition(dtype, Sk, pattern):
    B, H, Sq, p, seed = 2, 3, 256, 0.3, torch.tensor(-(2**40) - 17, device="cuda")
    q, k = (torch.zeros(B, H, size, 64, device="cuda", dtype=dtype) for size in (Sq, Sk))
    v = torch.eye(Sk, device="cuda", dtype=dtype).expand(B, H, Sk, Sk)
    o, _ = kernels.forward(q, k, v, None, seed, p, pattern, False, 1.0)
    keep = reference.keep_mask(seed, (B, H, Sq, Sk), p, pattern).expand(B, H, Sq, Sk)
    assert torch.equal(o != 0, keep)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["column", "element"])
def test_gpu_repeats_to_the_bit(pattern):
    case = replace(BIG, Hkv=2, mask="bias", dtype=torch.bfloat16)
    inputs = make_inputs(case, "cuda")
    qkv = [inputs[name] for name in "qkv"]
    arguments = inputs["attn_mask"], torch.tensor(3, device="cuda"), 0.1, pattern, True, 0.125

    def step():
        o, lse = kernels.forward(*qkv, *arguments)
        return o, lse, *kernels.backward(inputs["do"], *qkv, o, lse, *arguments, True, True, True, True)

    for first, second in zip(step(), step(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
def test_gpu_beyond_2_to_31_elements():
    """A single key is visible, and its rows lie beyond 2^31 elements: every output is known from them."""
    Sq, Sk, D = 64, 2**31 // 128 + 64, 128
    if torch.cuda.mem_get_info()[0] < 5 * 2 * Sk * D + 2**30:
        pytest.skip(f"needs {5 * 2 * Sk * D / 2**30 + 1:.0f} GiB of free GPU memory")
    q, do = (torch.randn(1, 1, Sq, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.zeros(1, 1, Sk, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v[:, :, -1] = torch.randn(D, device="cuda")
    mask = torch.zeros(1, 1, 1, Sk, device="cuda", dtype=torch.bool)
    mask[..., -1] = True
    seed = next(
        seed
        for seed in (torch.tensor(n, device="cuda") for n in itertools.count())
        if reference.keep_mask(seed, (1, 1, 1, Sk), 0.1, "span")[..., -1]
    )
    arguments = mask, seed, 0.1, "span", False, 1.0
    o, lse = kernels.forward(q, k, v, *arguments)
    assert torch.equal(o, v[:, :, -1:].expand_as(o))
    dq, dk, dv, _ = kernels.backward(do, q, k, v, o, lse, *arguments, True, True, True, False)
    assert_close(dv[:, :, -1], do.sum(2), do.double().sum(2), torch.bfloat16)
    assert dv[:, :, :-1].count_nonzero() == dk[:, :, :-1].count_nonzero() == dq.count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["column", "element", "span"])
def test_gpu_graph_reads_its_seed_on_the_device(pattern):
    """The captured step draws new keys whenever the seed tensor changes: nothing was read on the host."""
    inputs = make_inputs(replace(BIG, dtype=torch.bfloat16), "cuda")
    qkv = [inputs[name] for name in "qkv"]
    forward, seed = forward_ops["triton"], torch.tensor(1, device="cuda")
    want = {n: forward(*qkv, None, torch.tensor(n, device="cuda"), 0.3, pattern, True, 0.125) for n in (1, 2)}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = forward(*qkv, None, seed, 0.3, pattern, True, 0.125)
    for value in (2, 1):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(o, want[value][0])
        assert torch.equal(lse, want[value][1])
    assert not torch.equal(want[1][0], want[2][0])

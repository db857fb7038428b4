"""The emulator that executes the CUDA kernels without a GPU: it does what hardware does, and refuses the undefined."""

import ctypes
import subprocess

import pytest
import torch
from cuda_emulation.backend import ORDERS
from cuda_emulation.library import DTYPES, FLAGS, HERE, ROOT, TORCH_FLAGS, EmulationError, call, compiler, load, pointer

LANES = range(32)
HALVES = (torch.bfloat16, torch.float16)
CUDA = ROOT / "csrc" / "cuda"


@pytest.fixture(scope="module", params=ORDERS, ids=ORDERS.get)
def probes(request):
    """The library, its threads and blocks run in one order."""
    library = load("probes")
    library.emulated_set_order(ctypes.c_uint64(request.param))
    return library


def numbers():
    """64 integers at a multiple of 16 bytes, and room for 64."""
    return torch.arange(100, 164, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)


def run(probes, name, *tensors):
    call(getattr(probes, name), *map(pointer, tensors))


def test_a_barrier_holds_every_thread(probes):
    numbers_in, out = numbers()
    run(probes, "probe_reverse", numbers_in, out)
    assert torch.equal(out, numbers_in.flip(0))


def test_copies_arrive_when_waited_for_and_fill_with_zeros(probes):
    numbers_in, out = numbers()
    run(probes, "probe_copy", numbers_in, out)
    arrived = numbers_in.reshape(16, 4).clone()
    arrived[:, 3] = 0
    assert torch.equal(out, arrived.reshape(-1).flip(0))


def test_shuffle_up(probes):
    numbers_in, out = numbers()
    run(probes, "probe_shuffle_up", numbers_in, out)
    warps = numbers_in.reshape(2, 32)
    assert torch.equal(out.reshape(2, 32), torch.cat((warps[:, :4], warps[:, :-4]), 1))


def test_shuffle_xor(probes):
    numbers_in, out = numbers()
    run(probes, "probe_shuffle_xor", numbers_in, out)
    partners = torch.arange(64) ^ 5
    assert torch.equal(out, numbers_in[partners])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing_barrier", "is read (before anything is written there|without a barrier after a write)"),
        ("missing_barrier_after_read", "is written without a barrier after a read|is read without a barrier"),
        ("barrier_some_threads_miss", "waits at the barrier in line .*, which other threads never reach"),
        ("barriers_at_two_places", "waits at the barrier in line .*, which other threads never reach"),
        ("read_before_write", "is read before anything is written there"),
        ("shared_out_of_bounds", "writes shared byte 128 of 128"),
        ("shuffle_a_lane_misses", "waits for its warp at shuffle_up in line .*, which other lanes never reach"),
        ("copy_without_wait", "is read while an asynchronous copy is on its way there"),
        ("copy_without_barrier", "is read (while an asynchronous copy|without a barrier after|before anything)"),
    ],
)
def test_what_hardware_leaves_undefined_is_an_error(probes, name, message):
    with pytest.raises(EmulationError, match=rf"^block \(0, 0, 0\) thread \d+: .*({message})"):
        run(probes, f"probe_{name}", *numbers())


@pytest.mark.parametrize(
    ("grid", "threads", "shared_bytes"),
    [
        ((2**31, 1, 1), 32, 0),
        ((1, 65536, 1), 32, 0),
        ((1, 1, 65536), 32, 0),
        ((-1, 1, 1), 32, 0),
        ((1, 1, 1), 1056, 0),
        ((1, 1, 1), 32, 101377),
    ],
)
def test_what_no_device_launches_is_an_error(probes, grid, threads, shared_bytes):
    arguments = *map(ctypes.c_int64, grid), ctypes.c_int(threads), ctypes.c_int(shared_bytes)
    numbers_of_it = ", ".join(map(str, grid))
    message = rf"^no device launches \({numbers_of_it}\) blocks of {threads} threads and {shared_bytes} bytes$"
    with pytest.raises(EmulationError, match=message):
        call(probes.probe_launch, *arguments)


def test_the_largest_launch_is_none(probes):
    grid = map(ctypes.c_int64, (2**31 - 1, 65535, 65535))
    call(probes.probe_launch, *grid, ctypes.c_int(1024), ctypes.c_int(101376))


@pytest.mark.parametrize(
    ("name", "position", "message"),
    [
        ("global_out_of_bounds", 0, "reads global memory out of bounds"),
        ("global_unaligned", 0, "reads global memory unaligned"),
        ("written_twice", 1, "writes global memory that was written in the same launch"),
    ],
)
def test_global_memory_is_guarded(probes, name, position, message):
    with pytest.raises(EmulationError, match=message):
        run(probes, f"probe_{name}", numbers()[position])


def test_blocks_do_not_see_each_other_s_writes(probes):
    """Which block runs first is the scheduler's choice: with block 1 first the read is merely early."""
    out = torch.full((64,), -1, dtype=torch.int32)
    try:
        run(probes, "probe_read_of_another_block_s_write", out)
    except EmulationError as error:
        assert "reads global memory that another thread writes in the same launch" in str(error)  # noqa: PT017


def words(halves):
    """Pairs of 16-bit numbers as 32-bit words, the first one low."""
    return halves.contiguous().view(torch.int32).squeeze(-1)


@pytest.mark.parametrize("dtype", HALVES)
def test_multiply_matrices_is_mma_m16n8k16(probes, dtype):
    """Fragments filled by the formulas of the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"."""
    A, B = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    a, b = torch.empty(32, 8, dtype=dtype), torch.empty(32, 4, dtype=dtype)
    for lane in LANES:
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            a[lane, i] = A[row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(4):
            b[lane, i] = B[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group]
    acc = torch.empty(32, 4)
    fragments = words(a.reshape(32, 4, 2)), words(b.reshape(32, 2, 2))
    call(probes.probe_multiply, ctypes.c_int(DTYPES[dtype]), *map(pointer, (*fragments, acc)))
    C = torch.empty(16, 8)
    for lane in LANES:
        for i in range(4):
            C[(lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)] = acc[lane, i]
    torch.testing.assert_close(C, A.float() @ B.float())


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices_is_ldmatrix(probes, transposed):
    """Lane l holds row l / 4, elements 2 (l % 4) and the next, of each matrix (or of its transpose)."""
    matrices = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    to = torch.zeros(32, 4, dtype=torch.int32)
    call(probes.probe_load_matrices, pointer(matrices), pointer(to), ctypes.c_bool(transposed))
    shown = matrices.transpose(1, 2).contiguous() if transposed else matrices
    for lane in LANES:
        for i in range(4):
            assert to[lane, i] == words(shown[i, lane // 4, lane % 4 * 2 :][:2].clone())


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_torch_s(probes, dtype):
    values = torch.cat([torch.randn(5000) * 10.0**power for power in (-8, -6, -4, 0, 4)])
    values = torch.cat((values, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 65519.9, 65520.0, 2.0**-24, 2.0**-25])))
    out = torch.empty_like(values)
    call(probes.probe_round, ctypes.c_int(DTYPES[dtype]), pointer(values), pointer(out), ctypes.c_int64(len(values)))
    assert torch.equal(out, values.to(dtype).float())


# (file, text, replacement), and what the emulator says: nothing where the numbers come out wrong instead.
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("source", sorted(file.name for file in CUDA.glob("*.cu") if file.name != "launch.cu"))
def test_every_source_compiles_alone(source):
    """As setup.py compiles it, whatever kernels.cpp includes before it; launch.cu is nvcc's (test_cuda_compile.py)."""
    folders = [f"-I{CUDA}", f"-I{HERE}"]
    command = [compiler(), "-fsyntax-only", "-x", "c++", *folders, str(CUDA / source), *FLAGS, *TORCH_FLAGS[:1]]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


FAULTS = {
    "an index one row too far": (
        ("lora_linear_project.cuh", "member.h + (m * member.h_stride + r)", "member.h + (m * member.h_stride + R + r)"),
        "writes global memory out of bounds",
    ),
    "a wrong operand of the product": (
        ("tile.cuh", "lane % 16 * stride + lane / 16 * 8", "lane % 16 * stride"),
        None,
    ),
    "a missing barrier": (
        ("lora_linear_project.cuh", "sync_threads();\n    load(step + kStages - 1);", "load(step + kStages - 1);"),
        "is read before anything is written there|is read while an asynchronous copy|without a barrier",
    ),
    "a wait that is one step short": (
        ("lora_linear_project.cuh", "wait_for_copies<kStages - 2>()", "wait_for_copies<kStages - 1>()"),
        "is read while an asynchronous copy is on its way there",
    ),
    "a tail that is not cut": (
        ("tile.cuh", "? valid_columns(c, m.cols) : 0", "? kUnit : 0"),
        "reads global memory out of bounds",
    ),
    "columns that every member copies": (
        ("lora_linear_project.cuh", "args.columns && number == 0 && rank == 0", "args.columns && rank == 0"),
        "writes global memory that was written in the same launch",
    ),
    "a run of columns off the 16-byte grid": (
        ("lora_linear_project.cuh", "place[0] % kCopy == 0 && count % kCopy == 0", "true"),
        "writes global memory unaligned",
    ),
}


def is_right(order, *faults):
    """Whether the projection comes out right: sizes with tails of rows and columns, three steps of columns."""
    library = load("planted", *faults)
    library.emulated_set_order(ctypes.c_uint64(order))
    p, q = torch.randn(130, 136).bfloat16(), torch.randn(3, 136).bfloat16()
    kept = torch.tensor([*range(8, 20), *range(64, 88)])
    position = torch.full((136,), -1, dtype=torch.int32).index_copy(0, kept, torch.arange(len(kept)).int())
    h, other, columns = (torch.full((130, size), torch.nan).bfloat16() for size in (3, 3, len(kept)))
    tensors, sizes = (p, q, h, other, position, columns), (130, 136, 3, len(kept))
    call(library.planted_project, *map(pointer, tensors), *map(ctypes.c_int64, sizes))
    want = p.double() @ q.double().t()
    right = (h.double() - want).abs().max() <= torch.finfo(h.dtype).eps * want.abs().max()
    return bool(right) and torch.equal(h, other) and torch.equal(columns, p[:, kept])


@pytest.mark.parametrize("order", ORDERS, ids=ORDERS.get)
def test_the_projection_without_a_fault_is_right(order):
    assert is_right(order)


@pytest.mark.parametrize("order", ORDERS, ids=ORDERS.get)
@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(order, fault, message):
    if message is None:
        assert not is_right(order, fault)
    else:
        with pytest.raises(EmulationError, match=message):
            is_right(order, fault)

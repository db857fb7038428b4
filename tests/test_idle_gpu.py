"""The idle GPU of tests/idle_gpu: what a device would refuse is refused, what is copied arrives. Needs CUDA's headers,
no CUDA build of torch."""

import ctypes
import os
import shutil
import subprocess
import sys
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path

import pytest
from idle_gpu import build

MIB = 2**20
LIMIT = 64 * MIB
TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
GLOBAL, RELAXED = 0, 2  # cudaStreamCaptureMode
OK, INVALID, NO_MEMORY, NOT_LAUNCHED, NOT_SUPPORTED, CAPTURING, INVALIDATED = 0, 1, 2, 9, 801, 900, 901
MAX_DYNAMIC_SHARED = 8  # of cudaFuncAttribute and CUfunction_attribute
BFLOAT16, SWIZZLE_128B = 9, 3  # CUtensorMapDataType, CUtensorMapSwizzle


class Dim3(ctypes.Structure):
    _fields_ = [("x", c_uint), ("y", c_uint), ("z", c_uint)]


@pytest.fixture(scope="module")
def libraries():
    """(cudart, driver), of a device with LIMIT bytes."""
    try:
        folder = build.build(everything=False)
    except build.Unbuildable as reason:
        if "no headers" in str(reason) or "no C++ compiler" in str(reason):
            pytest.skip(f"the idle GPU cannot be built: {reason}")
        raise
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDLE_GPU_MEMORY", str(LIMIT / 2**30))
        cudart, driver = (ctypes.CDLL(str(folder / name)) for name in list(build.LIBRARIES)[:2])
        free, total = c_size_t(), c_size_t()
        assert cudart.cudaMemGetInfo(byref(free), byref(total)) == OK
        assert (free.value, total.value) == (LIMIT, LIMIT)
    return cudart, driver


@pytest.fixture
def cudart(libraries):
    return libraries[0]


@pytest.fixture
def driver(libraries):
    return libraries[1]


def allocated(cudart, size):
    block = c_void_p()
    assert cudart.cudaMalloc(byref(block), c_size_t(size)) == OK
    return block


@pytest.fixture
def block(cudart):
    """1 MiB of the device."""
    block = allocated(cudart, MIB)
    yield block
    assert cudart.cudaFree(block) == OK


@pytest.fixture
def stream(cudart):
    stream = c_void_p()
    assert cudart.cudaStreamCreate(byref(stream)) == OK
    return stream


@pytest.fixture
def kernel(cudart):
    """The address that stands for a kernel in nvcc's host code."""
    kernel = ctypes.create_string_buffer(1)
    cudart.__getattr__("__cudaRegisterFunction")(None, kernel, None, b"probe_kernel", -1, *[None] * 5)
    return kernel


LAUNCHES = [
    ((1, 1, 1), (1024, 1, 1), 0, True),
    ((2**31 - 1, 65535, 65535), (32, 1, 1), 0, True),
    ((2**31, 1, 1), (32, 1, 1), 0, False),
    ((1, 65536, 1), (32, 1, 1), 0, False),
    ((1, 1, 65536), (32, 1, 1), 0, False),
    ((0, 1, 1), (32, 1, 1), 0, False),
    ((1, 1, 1), (1024, 2, 1), 0, False),
    ((1, 1, 1), (1, 1, 65), 0, False),
    ((1, 1, 1), (0, 1, 1), 0, False),
    ((1, 1, 1), (32, 1, 1), 49153, False),
]


@pytest.mark.parametrize(("grid", "block", "shared", "possible"), LAUNCHES)
def test_launch_limits_of_the_runtime(cudart, kernel, grid, block, shared, possible):
    before = cudart.idle_gpu_launches()
    status = cudart.cudaLaunchKernel(kernel, Dim3(*grid), Dim3(*block), None, c_size_t(shared), None)
    assert (status, cudart.cudaGetLastError()) == ((OK, OK) if possible else (NOT_LAUNCHED, NOT_LAUNCHED))
    assert cudart.cudaGetLastError() == OK
    assert cudart.idle_gpu_launches() - before == possible


@pytest.mark.parametrize(("grid", "block", "shared", "possible"), LAUNCHES)
def test_launch_limits_of_the_driver(driver, grid, block, shared, possible):
    function = c_void_p()
    assert driver.cuModuleGetFunction(byref(function), None, b"probe_kernel") == OK
    status = driver.cuLaunchKernel(function, *map(c_uint, (*grid, *block, shared)), None, None, None)
    assert status == (OK if possible else INVALID)


def test_more_shared_memory_has_to_be_asked_for(cudart, kernel):
    launch = Dim3(1, 1, 1), Dim3(32, 1, 1), None, c_size_t(100000), None
    assert cudart.cudaLaunchKernel(kernel, *launch) == NOT_LAUNCHED
    assert cudart.cudaFuncSetAttribute(kernel, MAX_DYNAMIC_SHARED, 232449) == INVALID
    assert cudart.cudaFuncSetAttribute(kernel, MAX_DYNAMIC_SHARED, 100000) == OK
    assert cudart.cudaLaunchKernel(kernel, *launch) == OK


def test_a_refused_launch_of_ours_leaves_no_error_behind(libraries, tmp_path):
    """The next call of whoever asks cudaGetLastError, torch among them, would be blamed for it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the path")
    folder, library = Path(libraries[0]._name).parent, tmp_path / "refused.so"
    csrc, probe = Path(__file__).parents[1] / "csrc" / "cuda", Path(__file__).parent / "idle_gpu" / "refused.cu"
    command = [
        nvcc, "-std=c++17", "-arch=sm_90", "-shared", "-Xcompiler", "-fPIC", "-cudart", "none", "-I", csrc, probe,
        csrc / "launch.cu", f"-L{folder}", f"-l:{Path(libraries[0]._name).name}", "-o", library,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left = ctypes.CDLL(str(library)).error_left_by_a_refused_launch
    assert left(ctypes.c_int64(65536), c_int(0)) == OK
    assert left(ctypes.c_int64(1), c_int(MIB)) == OK
    assert left(ctypes.c_int64(1), c_int(0)) == -1


def test_copies_arrive(cudart, block, stream):
    sent, arrived = ctypes.create_string_buffer(b"weights"), ctypes.create_string_buffer(8)
    middle = c_void_p(block.value + 4096)
    assert cudart.cudaMemcpyAsync(block, sent, c_size_t(8), TO_DEVICE, stream) == OK
    assert cudart.cudaMemcpyAsync(middle, block, c_size_t(8), ON_DEVICE, stream) == OK
    assert cudart.cudaMemcpy(arrived, middle, c_size_t(8), TO_HOST) == OK
    assert arrived.value == b"weights"


def test_copies_stay_inside_and_on_their_side(cudart, block):
    host = ctypes.create_string_buffer(MIB + 1)
    for to, source, size, kind in (
        (block, host, MIB + 1, TO_DEVICE),
        (host, c_void_p(block.value + MIB - 1), 2, TO_HOST),
        (host, host, 8, TO_DEVICE),
        (block, host, 8, ON_DEVICE),
        (block, block, 8, TO_HOST),
    ):
        assert cudart.cudaMemcpy(to, source, c_size_t(size), kind) == INVALID
    assert cudart.cudaMemset(block, 0, c_size_t(MIB + 1)) == INVALID


def test_memory_ends_where_the_limit_says(cudart):
    first, second = allocated(cudart, LIMIT - MIB), c_void_p()
    assert cudart.cudaMalloc(byref(second), c_size_t(MIB + 1)) == NO_MEMORY
    assert second.value is None
    assert cudart.cudaFree(first) == OK
    assert cudart.cudaFree(first) == INVALID
    assert cudart.cudaMemset(first, 0, c_size_t(1)) == INVALID
    assert cudart.cudaFree(allocated(cudart, LIMIT)) == OK


def test_a_captured_stream_cannot_be_waited_for(cudart, block, stream):
    other, graph, host = c_void_p(), c_void_p(), ctypes.create_string_buffer(8)
    assert cudart.cudaStreamCreate(byref(other)) == OK
    for wait in (
        lambda: cudart.cudaStreamSynchronize(stream),
        lambda: cudart.cudaStreamQuery(stream),
        lambda: cudart.cudaMemcpyAsync(host, block, c_size_t(8), TO_HOST, stream),
    ):
        assert cudart.cudaStreamBeginCapture(stream, GLOBAL) == OK
        assert cudart.cudaStreamSynchronize(other) == OK
        assert wait() == CAPTURING
        assert cudart.cudaStreamEndCapture(stream, byref(graph)) == INVALIDATED
    assert cudart.cudaStreamSynchronize(stream) == OK


def test_what_may_wait_is_forbidden_by_the_mode_of_the_capture(cudart, stream):
    graph, block, mode = c_void_p(), c_void_p(), c_int(RELAXED)
    assert cudart.cudaStreamBeginCapture(stream, GLOBAL) == OK
    assert cudart.cudaMalloc(byref(block), c_size_t(MIB)) == CAPTURING
    assert cudart.cudaDeviceSynchronize() == CAPTURING
    assert cudart.cudaThreadExchangeStreamCaptureMode(byref(mode)) == OK
    assert mode.value == GLOBAL
    assert cudart.cudaMalloc(byref(block), c_size_t(MIB)) == OK
    assert cudart.cudaThreadExchangeStreamCaptureMode(byref(mode)) == OK
    assert cudart.cudaFree(block) == CAPTURING
    assert cudart.cudaStreamEndCapture(stream, byref(graph)) == OK
    assert cudart.cudaFree(block) == OK


def test_a_graph_holds_what_its_streams_were_given(cudart, block, stream, kernel):
    """Also a stream that waits for an event of the capture; nothing happens before the launch."""
    other, event, graph, executable, count = c_void_p(), c_void_p(), c_void_p(), c_void_p(), c_size_t()
    byte = ctypes.create_string_buffer(1)
    assert cudart.cudaStreamCreate(byref(other)) == OK
    assert cudart.cudaEventCreate(byref(event)) == OK
    assert cudart.cudaStreamBeginCapture(stream, GLOBAL) == OK
    assert cudart.cudaMemsetAsync(block, 7, c_size_t(1), stream) == OK
    assert cudart.cudaEventRecord(event, stream) == OK
    assert cudart.cudaStreamWaitEvent(other, event, 0) == OK
    assert cudart.cudaLaunchKernel(kernel, Dim3(1, 1, 1), Dim3(32, 1, 1), None, c_size_t(0), other) == OK
    assert cudart.cudaStreamEndCapture(stream, byref(graph)) == OK
    assert cudart.cudaGraphGetNodes(graph, None, byref(count)) == OK
    assert count.value == 2
    assert cudart.cudaGraphInstantiateWithFlags(byref(executable), graph, c_uint64(0)) == OK
    for launched in (False, True):
        if launched:
            assert cudart.cudaGraphLaunch(executable, stream) == OK
        assert cudart.cudaMemcpy(byte, block, c_size_t(1), TO_HOST) == OK
        assert byte.raw == (b"\x07" if launched else b"\x00")


MAP = {"sizes": (64, 32), "stride": 128, "box": (64, 16), "steps": (1, 1), "offset": 0, "rank": 2}


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, None),
        ({"stride": 120}, "a stride is no multiple of 16"),
        ({"offset": 8}, "the address is no multiple of 16"),
        ({"rank": 6}, "rank is not 1 to 5"),
        ({"sizes": (64, 0)}, "a size is not 1 to 2^32"),
        ({"box": (64, 257)}, "a side of the box is not 1 to 256"),
        ({"box": (12, 16)}, "the box's rows are no multiple of 16 bytes"),
        ({"box": (128, 16)}, "the box's rows are longer than the swizzle"),
        ({"steps": (9, 1)}, "an element stride is not 1 to 8"),
        ({"sizes": (64, 8193)}, "the tensor does not lie in one allocation on the device"),
    ],
)
def test_rules_of_tensor_maps(driver, block, capfd, changed, fault):
    m = MAP | changed
    encoded = (ctypes.c_char * 256)()
    aligned = c_void_p(ctypes.addressof(encoded) + -ctypes.addressof(encoded) % 64)
    status = driver.cuTensorMapEncodeTiled(
        aligned, BFLOAT16, m["rank"], c_void_p(block.value + m["offset"]), (c_uint64 * 5)(*m["sizes"]),
        (c_uint64 * 5)(m["stride"]), (c_uint * 5)(*m["box"]), (c_uint * 5)(*m["steps"]), 0, SWIZZLE_128B, 0, 0,
    )  # fmt: skip
    assert status == (INVALID if fault else OK)
    assert capfd.readouterr().err.strip().endswith(fault or "")


def test_a_pointer_of_the_host_is_none_of_the_device(driver, block):
    found = c_uint64()
    host = ctypes.create_string_buffer(8)
    of_pointer = 3  # CU_POINTER_ATTRIBUTE_DEVICE_POINTER
    assert driver.cuPointerGetAttribute(byref(found), of_pointer, block) == OK
    assert found.value == block.value
    assert driver.cuPointerGetAttribute(byref(found), of_pointer, host) == INVALID


def test_what_is_not_written_is_not_supported(cudart, driver):
    assert driver.cuMemAlloc_v2(byref(c_void_p()), c_size_t(1)) == NOT_SUPPORTED
    if build.real_library(next(iter(build.LIBRARIES))):
        assert cudart.cudaMallocManaged(byref(c_void_p()), c_size_t(1), 1) == NOT_SUPPORTED


def test_the_plugin_judges_all_but_values(tmp_path):
    """An assertion is not compared, any other exception fails, too little memory skips; --every thins out."""
    (tmp_path / "test_device.py").write_text(
        "import pytest, torch\n"
        "from lorasp import testing\n"
        "ONE = torch.ones(3)\n"
        "def test_value(): testing.assert_close(ONE, 2 * ONE, 2 * ONE, torch.float32)\n"
        "def test_shape(): testing.assert_close(ONE, ONE, ONE.view(3, 1), torch.float32)\n"
        "def test_assertion(): assert ONE.sum() == 0\n"
        "def test_error(): raise ValueError\n"
        "def test_memory(): raise torch.OutOfMemoryError\n"
        "@pytest.mark.parametrize('case', range(5))\n"
        "def test_cases(case): pass\n"
    )
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "idle_gpu.plugin", "--every", "2", "-rA", str(tmp_path)]
    paths = os.pathsep.join(filter(None, (str(tests), str(tests.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert "2 failed, 4 passed, 1 skipped, 2 deselected, 1 xfailed" in lines[-1], done.stdout
    assert {line.split()[1] for line in lines if line.startswith("FAILED")} == {
        "test_device.py::test_shape", "test_device.py::test_error"
    }  # fmt: skip

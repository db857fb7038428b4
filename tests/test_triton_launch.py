"""launch.Launch hands later calls to the kernel the JIT compiled for an earlier one; which, shows without a GPU."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.compiler import CompiledKernel

from lorasp.triton_kernels import launch, tuning
from lorasp.triton_kernels import lora_linear_products as products

if launch.INTERPRETED:
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

TARGET = tuning.target_of_arch(90)
M, C, R = 64, 128, 16


def project_launch(dropout=False):
    return products._project_launch.__wrapped__(
        TARGET, torch.bfloat16, M, C, R, (C, 1), True, dropout, "ieee"
    )[0]  # fmt: skip


def pointer(dtype, misaligned=False):
    return torch.empty(M * C + 1, dtype=dtype)[int(misaligned) :]


def variants():
    """What calls of one Launch may differ in: dtypes and alignment of pointers, numbers, and a seed or none."""
    kinds = list(itertools.product((torch.bfloat16, torch.float32), (False, True)))
    for p, q, scale, member in itertools.product(kinds, kinds, (0.5, 1.0), (0, 1, 16)):
        h = pointer(torch.bfloat16)
        for seed in (None, torch.zeros((), dtype=torch.int64)):
            yield pointer(*p), pointer(*q), h, scale, seed, 6554 if seed is not None else 0, member


def test_calls_share_a_kernel_exactly_where_the_jit_would():
    prepared, kernels = project_launch(), {}
    for values in variants():
        with launch.record(TARGET) as cases:
            prepared(*values)
        kernels.setdefault(prepared.kind(values), set()).update(cases)
    assert len(kernels) == 2 * 2 * 2 * 2 * 2  # dtype and alignment of two pointers, a seed or none
    assert all(len(cases) == 1 for cases in kernels.values())
    assert len(set.union(*kernels.values())) == len(kernels)


def test_every_device_has_kernels_of_its_own():
    class OnDevice:
        dtype = torch.bfloat16

        def __init__(self, index):
            self.get_device, self.data_ptr = lambda: index, lambda: 0

    prepared = project_launch()
    kinds = {prepared.kind((*[OnDevice(index)] * 3, 1.0, None, 0, 0)) for index in (0, 1, 0)}
    assert len(kinds) == 2


class Jit:
    """Stands for a JIT kernel on a GPU: counts its compilations, and the calls of what it compiled."""

    def __init__(self, kernel):
        self.arg_names, self.params, self.__name__ = kernel.arg_names, kernel.params, kernel.__name__
        self.analysed, self.calls = [], []

    def __getitem__(self, grid):
        def call(**arguments):
            self.analysed.append(arguments)
            return Compiled.of(self)

        return call


class Compiled(CompiledKernel):
    @classmethod
    def of(cls, jit):
        self = cls.__new__(cls)
        self.jit, self.module = jit, None
        return self

    def __getitem__(self, grid):
        return lambda *arguments: self.jit.calls.append((grid, arguments))


def test_a_later_call_of_a_kind_passes_the_jit_by():
    real = project_launch()
    jit = Jit(real._kernel)
    names = [name for name in jit.arg_names if name not in real._free]
    fixed = {name: real._template[jit.arg_names.index(name)] for name in names}
    prepared = launch.Launch(jit, (1, 2), fixed, real._free, 4, 3)
    q, h = pointer(torch.bfloat16), pointer(torch.bfloat16)
    first, second, odd = pointer(torch.bfloat16), pointer(torch.bfloat16), pointer(torch.bfloat16, misaligned=True)
    for p, scale in ((first, 0.5), (second, 2.0), (odd, 0.5), (first, 1.0)):
        prepared(p, q, h, scale, None, 0, 0)
    assert [call["p_ptr"] is p for call, p in zip(jit.analysed, (first, odd), strict=True)] == [True, True]
    assert [call["num_warps"] for call in jit.analysed] == [4, 4]
    expected = [second, first]
    for (grid, arguments), p, scale in zip(jit.calls, expected, (2.0, 1.0), strict=True):
        assert grid == (1, 2, 1)
        given = dict(zip(jit.arg_names, arguments, strict=True))
        assert given["p_ptr"] is p
        assert given["scale"] == scale
        assert {name: given[name] for name in names} == fixed


def test_arguments_must_fit_the_kernel():
    kernel = project_launch()._kernel
    with pytest.raises(TypeError, match=r"arguments .*'EXTRA'"):
        launch.Launch(kernel, (1,), {"EXTRA": 1}, kernel.arg_names, 4, 1)
    with pytest.raises(TypeError, match=r"arguments .*'scale'"):
        launch.Launch(kernel, (1,), {}, [name for name in kernel.arg_names if name != "scale"], 4, 1)


@pytest.mark.parametrize(("name", "value"), [("C", 128), ("member", 2**31)])
def test_a_number_that_the_jit_compiles_in_cannot_be_free(name, value):
    real = project_launch()
    fixed = dict(zip(real._names, real._template, strict=True))
    free = ("p_ptr", name)
    fixed = {key: value for key, value in fixed.items() if key not in free}
    prepared = launch.Launch(Jit(real._kernel), (1,), fixed, free, 4, 1)
    with pytest.raises(TypeError, match=f"{name} must not be free"):
        prepared(pointer(torch.bfloat16), value)


def test_shapes_are_looked_up_once_but_not_while_launches_are_intercepted():
    seen = []

    @launch.per_shape
    def build(*key):
        seen.append(key)
        return key

    for _ in range(2):
        build(1)
    with launch.record(TARGET):
        build(1)
        build(1)
    assert seen == [(1,)] * 3


def test_tiles_that_are_forced_or_newly_measured_make_new_launches():
    seen = []

    @launch.per_shape
    def build(*key):
        seen.append(key)

    def calls():
        seen.clear()
        for _ in range(2):
            build(1)
        return len(seen)

    with tuning.forced_tiles("lora_linear_skinny", "project", tuning.Tiles((("block_c", 64),))):
        assert calls() == 1
    assert (calls(), calls()) == (1, 0)
    tuning.forget_tables()
    assert calls() == 1

import gc

import pytest
import torch

from zoo.moe.kernels import memory

SHAPE = (1024, 1031)


@pytest.fixture(autouse=True)
def no_memory_of_other_tests(monkeypatch):
    """A slab a little larger would do too."""
    monkeypatch.setattr(memory, "_slabs", [])


def test_memory_is_used_again_once_no_tensor_holds_it():
    a = memory.empty(SHAPE, torch.float32)
    address = a.data_ptr()
    view = a[3:]
    del a
    assert memory.empty(SHAPE, torch.float32).data_ptr() != address
    del view
    gc.collect()
    assert memory.empty(SHAPE, torch.float32).data_ptr() == address


def test_a_gradient_kept_by_a_parameter_is_never_handed_out_again():
    parameter = torch.nn.Parameter(torch.zeros(SHAPE))
    parameter.grad = memory.empty_like(parameter).fill_(3.0)
    others = [memory.empty(SHAPE, torch.float32).fill_(7.0) for _ in range(4)]
    assert torch.equal(parameter.grad, torch.full(SHAPE, 3.0))
    assert len({t.data_ptr() for t in (parameter.grad, *others)}) == 5


def test_slabs_that_stay_idle_go_back(monkeypatch):
    kept = len([memory.empty(SHAPE, torch.float32) for _ in range(3)])
    assert kept == 3
    monkeypatch.setattr(memory, "IDLE_SECONDS", 0.0)
    block = memory.empty((4096, 4111), torch.float32)
    assert [s.size for s in memory._slabs if s.free] == []
    assert block.numel() == 4096 * 4111


def test_small_and_empty_tensors_are_ordinary():
    assert memory.empty((0, 5), torch.bfloat16).shape == (0, 5)
    assert memory.empty((3, 5), torch.float64).is_contiguous()


def test_strides_of_a_transposed_tensor_are_kept():
    t = torch.zeros(4, 700, 600).transpose(1, 2)
    assert memory.empty_like(t).stride() == t.stride()

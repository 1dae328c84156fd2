"""Our safetensors reader and writer against the library's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zoo.pretrained.tensorfile import DTYPES, read_header, write_file


def some(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shapes = {"a.weight": (3, 5), "scalar": (), "empty": (0, 4), "Ünï": (2, 1, 7)}
    return {name: torch.randint(0, 2, shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_dtype_goes_both_ways(dtype, tmp_path):
    tensors = some(dtype)
    save_file(tensors, tmp_path / "theirs")
    entries = read_header(tmp_path / "theirs")
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        target = torch.full_like(tensor, 1)
        entries[name].read_into(target)
        assert torch.equal(target, tensor)
    write_file(tmp_path / "ours", tensors.items())
    again = load_file(tmp_path / "ours")
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == dtype for name in tensors)
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_views_are_written_and_filled_in_place(tmp_path):
    stack = torch.randn(4, 6, 5)
    views = {
        "row": stack[2, 3:],
        "transposed": stack[0].T,
        "strided": stack[:, 1],
        "expanded": stack[0, 0].expand(3, 5),
    }
    write_file(tmp_path / "file", views.items())
    assert all(torch.equal(load_file(tmp_path / "file")[name], view) for name, view in views.items())
    filled = torch.zeros(4, 6, 5)
    entries = read_header(tmp_path / "file")
    entries["row"].read_into(filled[2, 3:])
    entries["strided"].read_into(filled[:, 1])
    expected = torch.zeros(4, 6, 5)
    expected[2, 3:], expected[:, 1] = stack[2, 3:], stack[:, 1]
    assert torch.equal(filled, expected)


def test_reading_converts_and_fills_parameters(tmp_path):
    save_file({"x": torch.randn(3, 2)}, tmp_path / "file")
    parameter = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    read_header(tmp_path / "file")["x"].read_into(parameter)
    assert torch.equal(parameter, load_file(tmp_path / "file")["x"].bfloat16())


def test_a_file_that_shrinks_after_its_header_was_read_is_noticed(tmp_path):
    path = Path(tmp_path / "file")
    save_file({"x": torch.randn(30, 20)}, path)
    entry = read_header(path)["x"]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"file: truncated: tensor x ends after 2395 of 2400 bytes"):
        entry.read_into(torch.zeros(30, 20))


def test_a_dtype_without_a_name_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"tensor x has dtype torch.complex64"):
        write_file(tmp_path / "file", [("x", torch.zeros(1, dtype=torch.complex64))])
    assert not (tmp_path / "file").exists()

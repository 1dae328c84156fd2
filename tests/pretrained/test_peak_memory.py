"""Loading a checkpoint takes the model's memory and hardly more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import theirs

# Resident memory of the whole process, pages of mapped files included: its peak while loading, less what it was before.
PROGRAM = """
import sys, zoo

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024

warm, folder, dtype = sys.argv[1:]
zoo.from_pretrained(warm)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # starts the peak anew
before = status("VmRSS")
model = zoo.from_pretrained(folder, dtype=dtype)
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize(("shards", "dtype", "times"), [("1GB", "bfloat16", 1), ("20MB", "float32", 2)])
def test_peak_memory_while_loading_is_below_1_2_times_the_weights(shards, dtype, times, tmp_path):
    theirs("mixtral").save_pretrained(tmp_path / "warm")
    model = theirs("mixtral", hidden_size=512, intermediate_size=1024).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "big", max_shard_size=shards)
    size = sum(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors"))
    assert size > 50e6
    assert peak(tmp_path / "warm", tmp_path / "big", dtype) < 1.2 * times * size


def peak(warm: Path, folder: Path, dtype: str) -> int:
    command = [sys.executable, "-c", PROGRAM, str(warm), str(folder), dtype]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

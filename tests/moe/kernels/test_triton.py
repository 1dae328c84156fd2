from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo.moe import Routing
from zoo.moe.kernels import moe_mlp
from zoo.moe.kernels import triton as kernels
from zoo.moe.kernels.triton.plans import PLANS


@pytest.mark.parametrize("name", ["triton_cases.py", "choice_cases.py", "coded_cases.py"])
def test_kernels_compute_what_the_reference_does(name: str) -> None:
    cases = Path(__file__).with_name(name)
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env=os.environ | interpret,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def weights(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return torch.zeros(3, 4, dtype=dtype), torch.zeros(2, 12, 4, dtype=dtype), torch.zeros(2, 4, 6, dtype=dtype)


def test_unsupported_tensors_are_named_in_words() -> None:
    assert kernels.unsupported(*weights(), "swiglu") == ("it needs a CUDA device (or TRITON_INTERPRET=1), x is on cpu")
    assert "not torch.float64" in str(kernels.unsupported(*weights(torch.float64), "swiglu"))


def test_a_backend_asked_for_by_name_says_why_it_cannot_run() -> None:
    routing = Routing.from_choices(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1), 2)
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run this: it needs a CUDA device"):
        moe_mlp(*weights(), routing, backend="triton")


@pytest.mark.parametrize("key", PLANS, ids=str)
def test_kernels_that_share_a_list_of_row_tiles_have_tiles_of_equal_height(key: tuple[str, int, str]) -> None:
    plan = PLANS[key]
    assert plan.up.m == plan.down.m
    assert plan.d_hidden.m == plan.d_x.m

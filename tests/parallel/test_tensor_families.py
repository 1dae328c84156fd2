"""Language families of transformers, each split as it says itself: outputs and gradients are those of one process.

Processes are copies of this one, which has no groups of its own: their threads would not be copied.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from zoo.parallel import Mesh, Sizes, parallelize
from zoo.parallel.tensor import planned
from zoo.pretrained import image_text

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_families import experts_classes, tiny_model

FAMILIES = (
    "afmoe",
    "deepseek_v2",
    "deepseek_v32",
    "ernie4_5_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe_swa",
    "jamba",
    "kimi_linear",
    "lfm2_moe",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "qwen3_next",
)
if tuple(int(part) for part in version("transformers").split(".")[:2]) < (5, 23):
    # Their plans do not say there that sinks are split with the heads.
    FAMILIES = tuple(family for family in FAMILIES if family not in ("granitemoe_swa", "mimo_v2_flash"))
KNOWN = {family: (family, module, experts) for family, module, experts in experts_classes() if family in FAMILIES}
MESHES = {"tensor": Sizes(tensor=2), "expert": Sizes(expert=2)}


def made(family: str):
    torch.manual_seed(0)
    model = tiny_model(*KNOWN[family]).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else p.data.add_(0.1 * torch.randn_like(p))
    return image_text.put_layers(model)


def results(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model(tokens, use_cache=False).logits
    logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    told = {}
    for family in KNOWN:
        for name, sizes in MESHES.items():
            model = made(family)
            parallelize(model, Mesh(sizes))
            told[family, name] = results(model)
    torch.save(told, f"{folder}/told-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    mp.start_processes(work, args=(str(folder),), nprocs=2, start_method="fork")
    return [torch.load(folder / f"told-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", KNOWN)
def test_two_processes_compute_what_one_does(told, family, mesh):
    logits, gradients = results(made(family))
    for rank in range(2):
        found, theirs = told[rank][family, mesh]
        assert (found - logits).norm() < 1e-5 * logits.norm()
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (theirs[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-8, name


def test_layers_beside_one_that_is_split_in_an_unknown_way_stay_whole():
    model = made("deepseek_v2")
    assert {style for name, style in planned(model).items() if ".self_attn." in name} >= {"colwise", "mla_kv_a_proj"}
    plan = {**model.config.base_model_tp_plan, "layers.*.self_attn.kv_a_proj_with_mqa": "something_new"}
    model.config.base_model_tp_plan = plan
    found = planned(model)
    assert found
    assert not [name for name in found if ".self_attn." in name]
    model.config.base_model_tp_plan = {**plan, "layers.*.self_attn": "something_else"}
    assert planned(model) == found

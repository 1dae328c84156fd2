"""Adapted models over two processes: what they compute and learn, and the folder they write together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from two_processes import results, spread

import zoo
from zoo.parallel import Mesh, Sizes, parallelize

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def base() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES))


def sparse(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return zoo.create_model("language/mixtral_tiny", num_hidden_layers=2, hidden_size=32, vocab_size=64).to(dtype)


# LoRA inside the experts of a sparse model, and adapters of another type than what they stand beside.
INSIDE = {"targets": ["query", "up", "down"], "dtype": "float32"}


# Attention of which some layers are adapted, beside norms of each head, which a tensor group has in parts.
ATTENTION = {
    "query": {"targets": ["query"]},
    "query, output": {"targets": ["query", "output"]},
    "experts": {"targets": ["up", "down"]},
}


def made(kind: str) -> Any:
    if kind in ATTENTION:
        torch.manual_seed(0)
        model = zoo.create_model("language/qwen3_moe_tiny", num_hidden_layers=2, hidden_size=32, vocab_size=64)
        return filled(zoo.adapt(model, "LoRA", **ATTENTION[kind]))
    if kind.startswith("MoLE"):
        narrow = kind.endswith("bfloat16")
        model = base().to(torch.bfloat16) if narrow else base()
        model = zoo.adapt(model, "MoLE", targets=["q_proj", "up_proj"], num_experts=3, rank=2, dtype="float32")
        for name, parameter in model.named_parameters():
            if name.endswith("lora.b"):
                nn.init.normal_(parameter, 0, 0.3)
    elif kind in ("inside", "inside bfloat16"):
        model = zoo.adapt(sparse(torch.float32 if kind == "inside" else torch.bfloat16), "LoRA", **INSIDE)
    elif kind.endswith("bfloat16"):
        model = zoo.adapt(base().to(torch.bfloat16), kind.split()[0], dtype="float32")
    else:
        model = zoo.adapt(base(), kind)
    return filled(model)


def filled(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return model


def test_parts_of_a_model_learn_what_the_whole_learns(tmp_path: Path) -> None:
    kinds = ("MoLA", "MixLoRA", "MoV", "MoLE", "Omni-SMoLA", "UniPELT")
    told = spread(tmp_path, made, kinds, {"shard": Sizes(shard=2)})
    for kind in kinds:
        logits, gradients = results(made(kind))
        for found, grads in (process[kind, "shard"] for process in told):
            torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
            assert grads.keys() == gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(
                    grads[name], gradient, rtol=1e-3, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_pairs_inside_experts_and_adapters_of_another_type_learn_alike(tmp_path: Path) -> None:
    kinds = (
        "inside",
        "inside bfloat16",
        "MoLA bfloat16",
        "MixLoRA bfloat16",
        "MoLE bfloat16",
        "UniPELT bfloat16",
        "MoV bfloat16",
    )
    told = spread(tmp_path, made, kinds, {"shard": Sizes(shard=2), "expert": Sizes(expert=2)})
    for kind in kinds:
        near = 1e-4 if kind == "inside" else 5e-2
        logits, gradients = results(made(kind))
        for process, mesh in ((process, mesh) for process in told for mesh in ("shard", "expert")):
            found, grads = process[kind, mesh]
            assert (found - logits).float().norm() < near * logits.float().norm()
            assert grads.keys() == gradients.keys()
            for name, gradient in gradients.items():
                assert grads[name].dtype == torch.float32
                assert (grads[name] - gradient).norm() < near * gradient.norm(), name


def test_a_tensor_group_learns_what_one_process_learns(tmp_path: Path) -> None:
    told = spread(tmp_path, made, ATTENTION, {"tensor": Sizes(tensor=2)})
    for kind in ATTENTION:
        logits, gradients = results(made(kind))
        for found, grads in (process[kind, "tensor"] for process in told):
            torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
            assert grads.keys() == gradients.keys()  # what is frozen stays so
            for name, gradient in gradients.items():
                assert (grads[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_the_folder_is_that_of_the_whole(tmp_path: Path) -> None:
    mp.start_processes(_save, args=(str(tmp_path),), nprocs=2, start_method="fork")
    again = zoo.from_pretrained(tmp_path / "adapters", base=base())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in made("MixLoRA").state_dict().items())


def _save(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = made("MixLoRA")
    parallelize(model, Mesh(Sizes(shard=2)))
    zoo.save_pretrained(model, f"{folder}/adapters")
    dist.destroy_process_group()

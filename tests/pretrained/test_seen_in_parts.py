"""Vision-language checkpoints read in parts: what each process reads, computes, learns and writes, and what is refused.

Processes are copies of this one, which has no groups of its own: their threads would not be copied.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from seen import batch
from test_image_text import family, theirs
from test_moe_llava import published

import zoo
from zoo.moe import Experts
from zoo.parallel import Mesh, Sizes
from zoo.parallel.parts import whole_state

MESHES = {2: Sizes(expert=2), 4: Sizes(shard=2, expert=2)}
NAMES = {
    2: ("aria_tiny", "glm4v_moe_tiny", "llava_mixtral_tiny", "qwen3_5_moe_tiny", "unlimited_ocr_tiny", "gemma4_tiny"),
    4: ("moe_llava_phi", "moe_llava_llama", "qwen3_vl_moe_tiny", "llama4_tiny", "ernie4_5_vl_tiny"),
}
if version("transformers") == "5.24.0":  # whose own Llama 4 fails on every input
    NAMES[4] = tuple(name for name in NAMES[4] if name != "llama4_tiny")
CASES = [(world, name) for world, names in NAMES.items() for name in names]
TRANSPOSED = ("aria_tiny", "llama4_tiny")  # files have [E, D, 2F], so that a row of theirs has columns of ours
WRONG = {"missing": "missing", "surplus": "unknown to", "shape": "has shape"}


def load(folder: Path, name: str, **options):
    if name.startswith("moe_llava"):
        return zoo.from_pretrained(
            folder / name, vision_tower=str(folder / name / "tower-config"), image_token_id=250, **options
        )
    return zoo.from_pretrained(folder / name, **options)


def seen(name: str, seed: int) -> dict[str, torch.Tensor]:
    return batch("llava" if name.startswith("moe_llava") else family(name), seed=seed)


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    told = {}
    for name in NAMES[world]:
        model = load(Path(folder), name, mesh=Mesh(MESHES[world]))
        logits = model(**seen(name, rank)).logits
        logits.square().mean().backward()
        state = whole_state(model)
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}
        zoo.save_pretrained(model, Path(folder) / "back" / f"{name}")
        told[name] = model.bytes_read, logits.detach(), state, gradients
    told["wrong"] = {}
    for path in sorted((Path(folder) / "wrong").iterdir()):
        with pytest.raises(ValueError) as error:
            load(path.parent, path.name, mesh=Mesh(MESHES[world]))
        told["wrong"][path.name] = str(error.value)
        dist.barrier()
    torch.save(told, f"{folder}/told{world}-{rank}.pt")
    dist.destroy_process_group()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for path in folder.glob("*.safetensors") for key, t in load_file(path).items()}


def spoil(source: Path, folder: Path, kind: str, name: str) -> None:
    held, key = (
        tensors(source),
        next(k for k in sorted(tensors(source)) if k.endswith("o_proj.weight") or "dense.weight" in k),
    )
    tensor = held.pop(key)
    changed = {
        "missing": {},
        "surplus": {key: tensor, f"{key}.more": tensor.clone()},
        "shape": {key: tensor[:-1].clone()},
    }[kind]
    target = folder / f"{name}-{kind}"
    target.mkdir(parents=True)
    save_file({**held, **changed}, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    if (source / "tower-config").exists():
        (target / "tower-config").symlink_to(source / "tower-config")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seen")
    for _, name in CASES:
        (folder / name).mkdir()
        if name.startswith("moe_llava"):
            published(folder / name, name)
        else:
            theirs(name).save_pretrained(folder / name)
    for kind in WRONG:
        for name in ("moe_llava_phi", "qwen3_vl_moe_tiny"):
            spoil(folder / name, folder / "wrong", kind, name)
    theirs("kimi_k25_tiny").save_pretrained(folder / "wrong" / "kimi_k25_tiny")
    (folder / "back").mkdir()
    found = {}
    for world in MESHES:
        mp.start_processes(work, args=(world, str(folder)), nprocs=world, start_method="fork")
        found[world] = [torch.load(folder / f"told{world}-{rank}.pt") for rank in range(world)]
    return folder, found


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


@pytest.mark.parametrize(("world", "name"), CASES)
def test_processes_compute_and_learn_what_one_does(world, name, told):
    folder, found = told
    model = load(folder, name)
    for rank in range(world):
        logits = model(**seen(name, rank)).logits
        (logits.square().mean() / world).backward()
        assert error(found[world][rank][name][1], logits) < 1e-5
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    floor = 1e-3 * max(gradient.abs().max() for gradient in expected.values())
    for _, _, _, gradients in (rank[name] for rank in found[world]):
        for key, gradient in expected.items():
            # Biases of keys have a gradient of zero but for rounding.
            largest = max(gradient.abs().max(), floor)
            assert (gradients[key] - gradient).abs().max() < 1e-4 * largest, key


@pytest.mark.parametrize(("world", "name"), CASES)
def test_what_was_read_is_written_again_bit_for_bit(world, name, told):
    folder, found = told
    model, state = load(folder, name), found[world][0][name][2]
    tied = set(model.all_tied_weights_keys or {})
    whole = {key: value for key, value in model.state_dict().items() if key not in tied}
    assert state.keys() - tied == whole.keys()
    assert all(torch.equal(state[key], value) for key, value in whole.items())
    before, after = tensors(folder / name), tensors(folder / "back" / name)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def rows(number: int, parts: int, part: int) -> int:
    step = -(-number // parts)
    return max(0, min(step, number - part * step))


@pytest.mark.parametrize(("world", "name"), CASES)
def test_each_process_reads_the_bytes_of_its_own_parts(world, name, told):
    folder, found = told
    model, sizes = load(folder, name), MESHES[world]
    stacks = {f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, Experts) for p, _ in m.named_parameters()}
    buffers = {n for n, _ in model.named_buffers()}
    tied = set(model.all_tied_weights_keys or {})
    for rank in range(world):
        expected = 0
        for key, tensor in model.state_dict().items():
            if key in tied:
                continue
            elif key in stacks:
                experts = rows(len(tensor), sizes.expert, rank % sizes.expert)
                inside = 1 if name in TRANSPOSED else sizes.shard
                expected += experts * rows(tensor.shape[1], inside, rank // sizes.expert % inside) * tensor[0, 0].nbytes
            elif key in buffers or tensor.dim() == 0 or (name.startswith("ernie") and "router.weight" in key):
                expected += tensor.nbytes  # ERNIE's files have gates as [D, E]
            else:
                expected += rows(len(tensor), world, rank) * tensor[0].nbytes
        assert found[world][rank][name][0] == expected


@pytest.mark.parametrize("world", MESHES)
def test_all_processes_say_what_is_wrong(world, told):
    for rank in told[1][world]:
        for name, message in rank["wrong"].items():
            if name == "kimi_k25_tiny":
                assert message.startswith("kimi_k25 cannot be read in parts: transformers' conversions do not say")
                continue
            kind = name.rpartition("-")[2]
            assert WRONG[kind] in message
            assert name in message
            assert "o_proj.weight" in message or "dense.weight" in message


@pytest.mark.parametrize("name", ["moe_llava_phi", "qwen3_vl_moe_tiny"])
def test_other_gates_are_refused_with_a_mesh(name, told):
    with pytest.raises(ValueError, match="with a mesh the gates are the checkpoint's own; leave out router"):
        load(told[0], name, mesh=object(), router="TopKRouter")


def test_experts_transposed_in_the_files_are_read_as_transformers_does(tmp_path):
    source = theirs("qwen3_vl_moe_tiny")
    source.save_pretrained(tmp_path / "qwen3_vl_moe_tiny")
    path = tmp_path / "qwen3_vl_moe_tiny" / "model.safetensors"
    held = load_file(path)
    turned = {k: t.transpose(1, 2).contiguous() if ".mlp.experts." in k else t for k, t in held.items()}
    save_file(turned, path, metadata={"format": "pt"})
    mp.start_processes(alone, args=(str(tmp_path),), nprocs=1, start_method="fork")
    read = torch.load(tmp_path / "alone.pt")
    whole = zoo.from_pretrained(path.parent).state_dict()
    assert all(torch.equal(read[key], value) for key, value in whole.items())


def alone(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=1)
    model = zoo.from_pretrained(Path(folder) / "qwen3_vl_moe_tiny", mesh=Mesh(Sizes()))
    torch.save(whole_state(model), f"{folder}/alone.pt")
    dist.destroy_process_group()

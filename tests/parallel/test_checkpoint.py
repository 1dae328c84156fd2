"""Checkpoints in parts: whole or absent, readable on other meshes, and clear about what is wrong with them.

Processes are copies of this one, which has no groups of its own: their threads would not be copied.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.moe import Experts, MoE
from zoo.moe.routers import TopKRouter
from zoo.parallel import Mesh, Sizes, parallelize
from zoo.parallel import checkpoint as store
from zoo.parallel.parts import whole_state


class Net(nn.Module):
    """Two blocks with experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = (nn.Sequential(nn.Linear(8, 8), MoE(TopKRouter(8, 4, 2), Experts(4, 8, 6))) for _ in range(2))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Both in a row."""
        for block in self.blocks:
            x = x + block(x)
        return x


def trained(sizes: Sizes, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = parallelize(Net(), Mesh(sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    for step in range(steps):
        torch.manual_seed(step)
        x = torch.randn(8, 8)
        share = x.chunk(sizes.data)[dist.get_rank() // sizes.tensor]
        F.mse_loss(model(share), -share).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def started(rank: int, world: int, folder: str, work: Callable[[Path], None]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    work(Path(folder))
    dist.destroy_process_group()
    (Path(folder) / "meet").unlink(missing_ok=True)


def run(world: int, folder: Path, work: Callable[[Path], None]) -> None:
    mp.start_processes(started, args=(world, str(folder), work), nprocs=world, start_method="fork")


def save_by_two(folder: Path) -> None:
    model, optimizer = trained(Sizes(expert=2))
    store.save(folder / "it.ckpt", model, {"optimizer_0": optimizer}, {"step": 2})
    model, optimizer = trained(Sizes(expert=2), 4)
    state = whole_state(model)
    if dist.get_rank() == 0:
        torch.save(state, folder / "later.pt")


def go_on(folder: Path) -> None:
    sizes = Sizes(tensor=2) if dist.get_world_size() == 2 else Sizes(shard=2, expert=2)
    model, optimizer = trained(sizes, 0)
    assert store.load(folder / "it.ckpt", model, {"optimizer_0": optimizer}) == {"step": 2}
    for step in (2, 3):
        torch.manual_seed(step)
        share = torch.randn(8, 8).chunk(sizes.data)[dist.get_rank() // sizes.tensor]
        F.mse_loss(model(share), -share).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.load(folder / "later.pt")
    for name, value in whole_state(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def disk_full(folder: Path) -> None:
    """Process 1 cannot write more than a few bytes: as with a full disk, every one is told."""
    model, optimizer = trained(Sizes(expert=2), 1)
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match=r"it\.ckpt: process \d could not write its part"):
        store.save(folder / "it.ckpt", model, {"optimizer_0": optimizer}, {"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert store.load(folder / "it.ckpt", model, {"optimizer_0": optimizer}) == {"step": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run(2, folder, save_by_two)
    return folder


def copied(saved: Path, folder: Path) -> Path:
    """The checkpoint in a folder of a test's own."""
    (folder / "it.ckpt").mkdir()
    for file in (saved / "it.ckpt").iterdir():
        (folder / "it.ckpt" / file.name).write_bytes(file.read_bytes())
    return folder / "it.ckpt"


@pytest.mark.parametrize("world", [2, 4])
def test_what_two_processes_saved_others_go_on_with(world: int, saved: Path) -> None:
    run(world, saved, go_on)


def test_one_process_puts_the_weights_together(saved: Path) -> None:
    found, net = store.whole_weights(saved / "it.ckpt"), Net()
    assert found.keys() == net.state_dict().keys()
    net.load_state_dict(found)
    assert not torch.equal(found["blocks.0.0.weight"], Net().state_dict()["blocks.0.0.weight"])


def test_a_full_disk_is_told_to_all_and_the_last_checkpoint_stays(saved: Path, tmp_path: Path) -> None:
    copied(saved, tmp_path)
    run(2, tmp_path, disk_full)


def damaged(folder: Path) -> None:
    model, optimizer = trained(Sizes(), 0)
    path = folder / "it.ckpt"
    part = path / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"it\.ckpt: the checkpoint cannot be read"):
        store.load(path, model, {"optimizer_0": optimizer})
    part.unlink()
    with pytest.raises(ValueError, match=r"it\.ckpt: the checkpoint cannot be read: .*__1_0\.distcp"):
        store.load(path, model, {"optimizer_0": optimizer})
    (path / "meta.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"it\.ckpt: no whole checkpoint: .metadata or meta.pt is missing"):
        store.load(path, model, {"optimizer_0": optimizer})


def interrupted(folder: Path) -> None:
    model, optimizer = trained(Sizes(), 0)
    path = folder / "it.ckpt"
    path.rename(path.with_name("it.ckpt.old"))
    assert store.load(path, model, {"optimizer_0": optimizer}) == {"step": 2}
    store.save(path, model, {"optimizer_0": optimizer}, {"step": 3})
    assert store.load(path, model, {"optimizer_0": optimizer}) == {"step": 3}
    assert [p.name for p in folder.glob("it*")] == ["it.ckpt"]


def in_the_background(folder: Path) -> None:
    """Training goes on while a checkpoint is written, which is of the moment it was asked for."""
    saver, path = store.Saver(), folder / "new.ckpt"
    model, optimizer = trained(Sizes(), 2)
    then = {name: value.full_tensor().clone() for name, value in model.state_dict().items()}
    saver.save(path, model, {"optimizer_0": optimizer}, {"step": 2})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    saver.save(path, model, {"optimizer_0": optimizer}, {"step": 3})  # puts the first in its place
    assert store.is_sharded(path)
    assert torch.load(path / store.META) == {"step": 2}
    other, its = trained(Sizes(), 0)
    first, _ = trained(Sizes(), 0)
    dcp.load({"model": (read := first.state_dict())}, checkpoint_id=path)
    for name, value in read.items():
        assert torch.equal(value.full_tensor(), then[name])
    saver.wait()
    assert store.load(path, other, {"optimizer_0": its}) == {"step": 3}
    assert all(bool((p.full_tensor() == 7).all()) for p in other.parameters())
    assert [p.name for p in folder.glob("new*")] == ["new.ckpt"]
    # What was whole when the processes ended, but had not been moved, is what is found.
    saver.save(path, model, {"optimizer_0": optimizer}, {"step": 4})
    assert saver._pending is not None
    saver._pending[1].result()
    assert store.load(path, other, {"optimizer_0": its}) == {"step": 4}
    store.save(path, model, {"optimizer_0": optimizer}, {"step": 5})
    assert store.load(path, other, {"optimizer_0": its}) == {"step": 5}


@pytest.mark.parametrize("work", [damaged, interrupted, in_the_background], ids=lambda work: work.__name__)
def test_what_an_accident_leaves_is_told_or_the_last_whole_one(
    work: Callable[[Path], None], saved: Path, tmp_path: Path
) -> None:
    copied(saved, tmp_path)
    run(1, tmp_path, work)


# How a published checkpoint is read by the processes of each mesh.
FAMILIES = ("mixtral", "deepseek_v3")
MESHES = (Sizes(expert=4), Sizes(shard=2, expert=2), Sizes(expert=2, tensor=2), Sizes(replicate=2, expert=2))


def read_in_parts(folder: Path) -> None:
    told = {}
    for family in FAMILIES:
        source = folder / family
        whole = zoo.from_pretrained(source).state_dict()
        for sizes in MESHES:
            model = zoo.from_pretrained(source, mesh=Mesh(sizes))
            state = whole_state(model)
            ids = torch.arange(10)[None]
            logits = model(ids).logits
            if dist.get_rank() == 0:
                assert state.keys() == whole.keys()
                for name, value in whole.items():
                    assert torch.equal(state[name], value), name
            told[f"{family} {sizes}"] = model.bytes_read, logits.detach()
        back = zoo.from_pretrained(source, mesh=Mesh(Sizes(expert=2, tensor=2)))
        zoo.save_pretrained(back, folder / "back" / family)
    seen = parallelize(zoo.from_pretrained(folder / "moe_llava"), Mesh(Sizes(shard=2, expert=2)))
    zoo.save_pretrained(seen, folder / "back" / "moe_llava")
    # Gates in float32 beside weights in bfloat16, which FSDP shards by themselves.
    mixed = zoo.from_pretrained(folder / "mixed", dtype="auto", mesh=Mesh(Sizes(shard=2, expert=2)))
    zoo.save_pretrained(mixed, folder / "back" / "mixed")
    torch.save(told, folder / f"read{dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    for family in FAMILIES:
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64, "initializer_range": 0.2}
        zoo.save_pretrained(zoo.create_model(f"language/{family}_tiny", **sizes), folder / family)
    zoo.save_pretrained(zoo.create_model("vision_language/moe_llava_tiny"), folder / "fresh")
    zoo.save_pretrained(zoo.from_pretrained(folder / "fresh"), folder / "moe_llava")  # with the dtype that was read
    mixed = zoo.from_pretrained(folder / "mixtral", dtype="bfloat16")
    for module in mixed.modules():
        if isinstance(module, MoE):
            module.router.float()
    zoo.save_pretrained(mixed, folder / "mixed")
    (folder / "back").mkdir()
    run(4, folder, read_in_parts)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_each_process_reads_its_own_parts_of_a_published_checkpoint(family: str, published: Path) -> None:
    told = [torch.load(published / f"read{rank}.pt") for rank in range(4)]
    model = zoo.from_pretrained(published / family)
    expected = model(torch.arange(10)[None]).logits
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    everything = sum(t.nbytes for t in model.state_dict().values())
    for sizes in MESHES:
        for read, logits in (rank[f"{family} {sizes}"] for rank in told):
            assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
            # A process's share of the experts, and of the rest at most the rows that its part is in.
            own = experts // (sizes.expert * sizes.shard * sizes.tensor)
            assert own < read <= own + everything - experts
    # Nothing but a shard of everything where all is sharded: 4 processes read the files once, but for what is whole.
    once = sum(rank[f"{family} {Sizes(expert=4)}"][0] for rank in told)
    whole = sum(b.nbytes for b in model.buffers() if b.dtype == torch.float32)
    assert everything <= once <= everything + 4 * whole


@pytest.mark.parametrize("family", [*FAMILIES, "moe_llava", "mixed"])
def test_a_model_in_parts_is_written_as_its_family_is(family: str, published: Path) -> None:
    files = [published / family / "model.safetensors", published / "back" / family / "model.safetensors"]
    assert files[0].read_bytes() == files[1].read_bytes()
    configs = [json.loads((file.parent / "config.json").read_text()) for file in files]
    assert configs[0] == configs[1]

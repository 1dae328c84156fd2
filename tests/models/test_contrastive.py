"""The contrastive loss: its definition by a loop, and that many processes learn what one with all pairs would."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import zoo
from zoo.models.contrastive import contrastive_loss, gather
from zoo.models.limoe_gates import entropy_losses
from zoo.moe import record

# Pairs of each process, uneven; the last process of three has none of the padding that the others have.
SHARES = {2: [3, 2], 3: [2, 1, 4]}


def unit(n: int, p: int = 5) -> Tensor:
    return F.normalize(torch.randn(n, p, dtype=torch.float64), dim=-1)


def test_it_is_the_mean_cross_entropy_of_both_directions() -> None:
    image, text, scale = unit(6), unit(6), 7.3
    expected = 0.0
    for i in range(6):
        for own, others in ((image[i], text), (text[i], image)):
            scores = [scale * float(own @ other) for other in others]
            expected += math.log(sum(math.exp(s) for s in scores)) - scores[i]
    found = contrastive_loss(image, text, torch.tensor(scale))
    assert found.item() == pytest.approx(expected / 12, rel=1e-6)
    assert torch.autograd.gradcheck(
        contrastive_loss, [t.requires_grad_() for t in (unit(3), unit(3), torch.tensor(2.0, dtype=torch.float64))]
    )


def test_one_pair_has_no_loss_and_half_precision_is_computed_in_float32() -> None:
    assert contrastive_loss(unit(1), unit(1), torch.tensor(3.0)).item() == 0
    image, text = unit(40).bfloat16(), unit(40).bfloat16()
    exact = contrastive_loss(image.double(), text.double(), torch.tensor(100.0).double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert contrastive_loss(image, text, torch.tensor(100.0)).item() == pytest.approx(exact.item(), rel=1e-5)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[3, 5\] and \[2, 5\]"):
        contrastive_loss(unit(3), unit(2), torch.tensor(1.0))


def model_and_data(pairs: int) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(5)
    # Noise differs between processes, and what an expert drops depends on the others: neither is part of the claim.
    losses = {**entropy_losses(4, weight=0.3, global_batch=True), "z": 0.0}
    losses["global_entropy"]["minimum"] = [3.99, 3.9]  # active, so that the test sees it
    gate = {"name": "TopKRouter", "k": 2, "noise": None, "losses": losses, "capacity": None}
    model = zoo.create_model("vision_language/limoe_tiny", router=gate, num_experts=4, embed_dim=16, depth=2).double()
    for block in model.blocks[1:]:
        block.mlp.router.weight.data *= 8  # sure of its choices, so that means over processes differ
    lengths = torch.randint(1, 9, (pairs, 1))
    image = torch.randn(pairs, 1, 16, 16, dtype=torch.float64)
    return model, {"image": image, "ids": torch.randint(64, (pairs, 8)), "mask": torch.arange(8) < lengths}


def backward(model: Any, inner: Any, data: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    with record(inner) as step:
        out = model(**data)
    losses = step.losses()
    loss = contrastive_loss(out.image, out.text, out.scale)
    (loss + sum(losses.values())).backward()
    gradients = {name: p.grad for name, p in inner.named_parameters()}
    return loss.detach(), {name: value.detach() for name, value in losses.items()}, gradients


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    model, data = model_and_data(sum(SHARES[world]))
    start = sum(SHARES[world][:rank])
    mine = {name: value[start : start + SHARES[world][rank]] for name, value in data.items()}
    found = backward(DistributedDataParallel(model), model, mine)
    torch.save((found, gather(mine["ids"])), f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """A fork of a process with more threads may hang in its first parallel region."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_learn_what_one_with_all_pairs_would(world: int, tmp_path: Any) -> None:
    mp.start_processes(worker, args=(world, str(tmp_path)), nprocs=world, start_method="fork")
    ranks = [torch.load(tmp_path / f"{world}-{rank}.pt") for rank in range(world)]
    model, data = model_and_data(sum(SHARES[world]))
    loss, losses, gradients = backward(model, model, data)
    torch.testing.assert_close(torch.stack([found[0] for found, _ in ranks]).mean(), loss)
    for name in ("local_entropy", "global_entropy"):
        assert losses[name] > 0.01
        for found, _ in ranks:
            torch.testing.assert_close(found[1][name], losses[name])
    for name, expected in gradients.items():
        scale = float(expected.abs().max())
        assert scale > 0, name
        for found, _ in ranks:
            torch.testing.assert_close(found[2][name], expected, rtol=1e-9, atol=1e-10 * scale)
    for rank, (_, (rows, first)) in enumerate(ranks):
        assert torch.equal(rows, data["ids"])
        assert first == sum(SHARES[world][:rank])

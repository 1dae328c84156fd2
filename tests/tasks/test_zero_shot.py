"""Retrieval and classes by name, by brute force, and the same over processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

import zoo
from tasks.zero_shot import class_embeddings, retrieval
from zoo.data.pairs_rows import encode_texts
from zoo.data.tokenizer import ByteTokenizer

KS = (1, 3, 10)
# Images and texts of each process: uneven, and one without any.
SHARES = ([5, 0, 8], [9, 3, 11])


def data(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    image, text = (F.normalize(torch.randn(sum(share), 3), dim=-1) for share in SHARES)
    text[:4] = text[4]  # ties, some of them right
    # Several texts an image, several images a text, and some of either without a counterpart.
    return [image, text, torch.randint(7, (len(image),)), torch.randint(8, (len(text),))]


def by_loop(image: Tensor, text: Tensor, group: Tensor, text_group: Tensor) -> dict[str, float]:
    found: dict[str, float] = {}
    directions = (("text", image, group, text, text_group), ("image", text, text_group, image, group))
    for what, queries, own, others, theirs in directions:
        for k in KS:
            hits = 0
            for q, mine in zip(queries.double(), own.tolist()):
                scores = [float(q @ o) for o in others.double()]
                # The right ones last among equals: the least favourable order.
                order = sorted(range(len(scores)), key=lambda j: (-scores[j], theirs[j] == mine))
                hits += any(theirs[j] == mine for j in order[:k])
            found[f"{what}_recall_{k}"] = hits / len(queries)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_recall_is_what_a_loop_finds(seed: int) -> None:
    found = retrieval(*data(seed), ks=KS)
    assert found == pytest.approx(by_loop(*data(seed)), abs=1e-12)
    assert 0 < found["text_recall_1"] < found["text_recall_3"] < found["text_recall_10"] <= 1


def test_one_embedding_for_all_finds_nothing_and_perfect_ones_everything() -> None:
    same, groups = torch.ones(40, 2), torch.arange(40)
    assert set(retrieval(same, same, groups, groups, ks=KS).values()) == {0.0}
    perfect = torch.eye(40)
    assert set(retrieval(perfect, perfect, groups, groups, ks=KS).values()) == {1.0}
    nothing = retrieval(perfect[:0], perfect, groups[:0], groups, ks=(1,))
    assert math.isnan(nothing["text_recall_1"])
    assert nothing["image_recall_1"] == 0
    few = retrieval(perfect[:2], perfect[:3], groups[:2], groups[5:8], ks=(1, 10))  # fewer than k, and none right
    assert set(few.values()) == {0.0}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    mine = [whole.split(share)[rank] for whole, share in zip(data(), (SHARES[0], SHARES[1], SHARES[0], SHARES[1]))]
    torch.save(retrieval(*mine, ks=KS), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_find_what_one_finds(tmp_path: Any) -> None:
    mp.start_processes(worker, (str(tmp_path),), nprocs=3, start_method="fork")
    expected = by_loop(*data())
    for rank in range(3):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(expected, abs=1e-12)


def test_a_class_is_the_mean_of_its_prompts() -> None:
    model = zoo.create_model("vision_language/limoe_tiny", vocab_size=259, text_length=24).double().eval()
    classes, templates = ["cat", "dog", "{} bird"], ["{}", "a photo of a {}"]
    found = class_embeddings(model, ByteTokenizer(), classes, templates, batch_size=4)
    for row, name in zip(found, classes):
        prompts = [name, f"a photo of a {name}"]
        mean = sum(model(ids=encode_texts(ByteTokenizer(), [prompt], 24)[0]).text[0] for prompt in prompts)
        torch.testing.assert_close(row, mean / mean.norm())
    with pytest.raises(ValueError, match=r"'a photo' has no \{\}"):
        class_embeddings(model, ByteTokenizer(), classes, ["a photo"])


def test_images_that_fill_up_a_batch_compete_with_none_in_zero_shot_classification(monkeypatch):
    from tasks.vision_language import ContrastiveTask

    torch.manual_seed(0)
    capacity = {"factor": 1.0, "eval_factor": 0.25, "drop": "priority"}
    model = zoo.create_model("vision_language/limoe_tiny", capacity=capacity).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() else None
    task = ContrastiveTask(model)
    monkeypatch.setattr(task, "_names", lambda: tuple("abcdefgh"))
    task.model = model
    images = torch.randn(6, model.channels, model.image_size, model.image_size)
    index = torch.tensor([3, -1, 5, 8, -1, -1])
    real = index >= 0
    with torch.no_grad():
        alone, crowded = model(images[real]).image, model(images).image[real]
        moved = ((alone - crowded).abs().amax(1) > 1e-3)[:, None]
        assert moved.any()  # capacity is short
        # Each image's embedding among the others, where that is another, and then each by itself.
        classes = torch.cat([crowded.where(moved, -alone), alone, -alone[:2]])
        task.on_validation_epoch_start()
        task._classes = classes
        labels = torch.full((6,), -100)
        labels[real] = torch.tensor([3, 4, 5])  # those that the images alone have
        task.validation_step({"image": images, "label": labels, "index": index, "skipped": torch.zeros(6)}, 0)
    assert task._sums.tolist()[0] == task._sums.tolist()[2] == 3

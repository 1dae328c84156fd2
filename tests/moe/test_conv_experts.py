"""Convolutional experts: pMoE's patches and DeepMoE's channels."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zoo.moe import DeepMoE, GatedConv2d, PatchMoE, record, shallow_embedding, telemetry
from zoo.moe.routers import PatchRouter, TopKRouter


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Images this small take longer on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def patch_layer(size: int = 2, patches: int = 3, router: Any = None, seed: int = 0, **options: Any) -> PatchMoE:
    """Three experts of two convolutions, the first within a patch, on images of two channels."""
    torch.manual_seed(seed)
    router = PatchRouter(2 * size**2, 3, patches, **options) if router is None else router
    experts = [nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Conv2d(4, 5, size)) for _ in range(3)]
    return PatchMoE(router, experts, size).double()


def patches_by_loop(layer: PatchMoE, x: Tensor, patches: int, softmax: str, mask: Tensor | None = None) -> Tensor:
    """Each image and expert apart: its patches of largest w . x, weighed over those or over all of the image."""
    size = layer.patch_size
    out = []
    for b, image in enumerate(x):
        across = image.shape[2] // size
        cut = {
            i * across + j: image[:, i * size : (i + 1) * size, j * size : (j + 1) * size]
            for i in range(image.shape[1] // size)
            for j in range(across)
            if mask is None or mask[b, i * across + j]
        }
        maps = torch.zeros(3, 5, image.shape[1] // size, across, dtype=x.dtype)
        for e, expert in enumerate(layer.experts):
            logits = {p: layer.router.weight[e] @ patch.flatten() for p, patch in cut.items()}  # type: ignore[index]
            best = sorted(cut, key=lambda p: -float(logits[p].detach()))[:patches]
            total = sum(logits[p].exp() for p in (best if softmax == "chosen" else cut))
            for p in best:
                value = expert(cut[p][None])[0, :, 0, 0] * logits[p].exp() / total
                at = torch.zeros(maps.shape[2:], dtype=x.dtype)
                at[p // across, p % across] = 1
                maps = maps + torch.eye(3, dtype=x.dtype)[e][:, None, None, None] * value[:, None, None] * at
        out.append(maps.flatten(0, 1))
    return torch.stack(out)


@pytest.mark.parametrize("softmax", ["chosen", "tokens"])
@pytest.mark.parametrize(("size", "patches"), [(2, 3), (2, 50), (1, 4), (4, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_experts_take_the_patches_they_score_highest(softmax: Any, size: int, patches: int, masked: bool) -> None:
    layer = patch_layer(size, patches, softmax=softmax)
    x = torch.randn(3, 2, 8, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 32 // size**2) > 0.4 if masked else None
    if mask is not None:
        mask[0] = False
    found = layer(x, **({} if mask is None else {"mask": mask}))
    expected = patches_by_loop(layer, x, patches, softmax, mask)
    torch.testing.assert_close(found, expected)
    variables, direction = (x, *layer.parameters()), torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(out, variables, direction) for out in (found, expected))):
        torch.testing.assert_close(a, b)


def test_with_relu_and_no_bias_it_is_the_authors_code() -> None:
    """There the gate, zero for patches not chosen, multiplies the patch, and one convolution runs over the image."""
    layer = PatchMoE(PatchRouter(9, 4, 2), [nn.Sequential(nn.Conv2d(1, 5, 3, bias=False), nn.ReLU())] * 4, 3).double()
    x = torch.randn(2, 1, 12, 12, dtype=torch.float64)
    found = layer(x)
    for e in range(4):
        kernel = layer.router.weight[e].view(1, 1, 3, 3)  # type: ignore[index]
        logits = F.conv2d(x, kernel, stride=3).flatten(1)
        values, index = logits.topk(2)
        gates = torch.zeros_like(logits).scatter(1, index, values.softmax(-1)).view(2, 1, 4, 4)
        gated = x * gates.repeat_interleave(3, 2).repeat_interleave(3, 3)
        expected = F.conv2d(gated, layer.experts[e][0].weight, stride=3).relu()  # type: ignore[index]
        torch.testing.assert_close(found[:, 5 * e : 5 * e + 5], expected)


def test_an_expert_may_keep_its_patch_a_map_or_make_it_a_vector() -> None:
    router, x = PatchRouter(8, 2, 8), torch.randn(3, 2, 8, 4)
    keeping = PatchMoE(router, [nn.Conv2d(2, 6, 3, padding=1) for _ in range(2)], 2)
    assert keeping(x).shape == (3, 12, 8, 4)
    same = PatchMoE(router, [nn.Identity(), nn.Identity()], 2)
    weights = router(x.view(3, 2, 4, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(3, 8, 8)).dense().view(3, 4, 2, 2)
    spread = weights.permute(0, 3, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(same(x), (spread[:, :, None] * x[:, None]).flatten(1, 2))
    vector = PatchMoE(router, [nn.Sequential(nn.Flatten(), nn.Linear(8, 3)) for _ in range(2)], 2)
    assert vector(x).shape == (3, 6, 4, 2)


def step_of(layer: nn.Module, call: Any, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    torch.manual_seed(1)
    with record(layer) as step:
        y = call(x)
        losses = step.losses()
        (y.square().sum() + sum(losses.values())).backward()
    assert {len(calls) for calls in step.routings.values()} == {1}
    return [y.detach(), *losses.values(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


def same_step(layer: nn.Module, x: Tensor) -> None:
    """Compiled and checkpointed it does the same as it does plainly, and counts once."""
    torch._dynamo.reset()
    expected = step_of(layer, layer, x)
    for call in (
        torch.compile(layer, backend="aot_eager"),
        lambda x: checkpoint(layer, x, use_reentrant=False),
    ):
        for a, b in zip(step_of(layer, call, x), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("router", [None, TopKRouter(8, 3, 1, losses={"switch": 0.1})], ids=["pMoE", "top-1"])
def test_patches_compiled_and_checkpointed_are_the_same(router: Any) -> None:
    same_step(patch_layer(router=router), torch.randn(2, 2, 4, 4, dtype=torch.float64))


def test_a_saved_state_gives_the_same_patches() -> None:
    layer, other, x = patch_layer(), patch_layer(seed=9), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("shape", [(3, 2, 8, 4), (3, 2, 2, 2)])
def test_how_the_image_lies_in_memory_does_not_matter(shape: tuple[int, ...]) -> None:
    layer, x = patch_layer(), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), layer(x))


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (1, 2, 2, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_no_image_and_one_patch(shape: tuple[int, ...], training: bool) -> None:
    layer = patch_layer().train(training)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == (shape[0], 15, shape[2] // 2, shape[3] // 2)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_patches_that_nobody_chose_are_nowhere_and_experts_are_equally_busy() -> None:
    layer = patch_layer(patches=1)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    with record(layer) as step:
        found = layer(x)
    (routing,) = step.routings[""]
    assert telemetry.load(routing).tolist() == pytest.approx([1 / 3] * 3)
    assert (found.unflatten(1, (3, 5)).abs().sum(2) > 0).flatten(2).sum(-1).tolist() == [[1] * 3] * 2
    idle = (telemetry.kept_per_token(routing) == 0).view(2, 2, 2)
    changed = torch.where(idle.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None], 0.0, x)
    torch.testing.assert_close(layer(changed), found)


def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    return torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target)


def threes_and_fives(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 24, 24] of nine digits, of which one is a three or a five, and which of these: 0 or 1."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    wanted = (labels == 3) | (labels == 5)

    def draw(source: Tensor, number: int) -> Tensor:
        return source[torch.randint(len(source), (number,), generator=generator)]

    picked = draw(wanted.nonzero()[:, 0], count)
    nine = draw(images[~wanted], 9 * count).view(count, 9, 8, 8)
    nine[torch.arange(count), torch.randint(9, (count,), generator=generator)] = images[picked, 0]
    return nine.view(count, 3, 3, 8, 8).transpose(2, 3).reshape(count, 1, 24, 24), (labels[picked] == 5).long()


class Pooled(nn.Module):
    """A layer, its maps summed over places, and two classes."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).sum((2, 3)))


def error_on_digits(model: nn.Module) -> float:
    (x, y), (unseen, labels) = threes_and_fives(200, 1), threes_and_fives(1000, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(unseen).argmax(-1) != labels).float().mean())


def test_experts_of_patches_find_what_matters() -> None:
    """With fewer filters applied to an image than a CNN has, pMoE makes less than half of its errors."""
    errors = {"pMoE": 0.0, "CNN": 0.0}
    for seed in (1, 2):
        torch.manual_seed(seed)
        experts = [nn.Sequential(nn.Conv2d(1, 4, 8), nn.ReLU()) for _ in range(4)]
        errors["pMoE"] += error_on_digits(Pooled(PatchMoE(PatchRouter(64, 4, 2), experts, 8), 16))  # 4 * 2 * 4 filters
        torch.manual_seed(seed)
        errors["CNN"] += error_on_digits(Pooled(nn.Sequential(nn.Conv2d(1, 4, 8, stride=8), nn.ReLU()), 4))  # 9 * 4
    assert errors["pMoE"] < errors["CNN"] / 2, errors


def resnet(channels: int = 8) -> Any:
    timm = pytest.importorskip("timm.models.resnet")
    widths = (channels, 2 * channels, 2 * channels, 2 * channels)
    return timm.ResNet(timm.BasicBlock, (1, 1, 1, 1), num_classes=10, in_chans=1, channels=widths)


def deep_moe(seed: int = 0, **options: Any) -> DeepMoE:
    torch.manual_seed(seed)
    return DeepMoE(resnet(), 10, embedding_dim=16, **options)


def test_a_resnet_keeps_all_but_its_gates() -> None:
    plain = resnet()
    state = copy.deepcopy(plain.state_dict())
    model = DeepMoE(plain, 10)
    gated = {name: m for name, m in model.named_modules() if isinstance(m, GatedConv2d)}
    assert set(gated) == {f"backbone.layer{i}.0.conv{j}" for i in (1, 2, 3, 4) for j in (1, 2)}
    kept = {n.removeprefix("backbone.").replace(".conv.", "."): v for n, v in model.backbone.state_dict().items()}
    assert {name: kept[name] for name in state}.keys() == state.keys()
    assert all(torch.equal(kept[name], value) for name, value in state.items())
    x = torch.randn(2, 1, 32, 32)
    reference = resnet()
    reference.load_state_dict(state)
    for module in gated.values():
        module.router.gates = lambda e, c=module.conv.out_channels: torch.ones(len(e), c)  # type: ignore[assignment]
    torch.testing.assert_close(model.eval()(x), reference.eval()(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("images", [1, 3])
def test_channels_count_by_the_gate_of_each_image(training: bool, images: int) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 1, stride=2, bias=False))
    first, last = (copy.deepcopy(backbone[i]).double() for i in (0, 2))
    model = DeepMoE(backbone, 3, embedding_dim=4, layers=("0", "2"), sparsity=0.1).double().train(training)
    x = torch.randn(images, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    with record(model) as step:
        found = model(x)
    e = model.embedding(x)
    gates = [(e @ backbone[i].router.weight.T).clamp(min=0) for i in (0, 2)]
    assert all(0 < (g > 0).sum() < g.numel() for g in gates)
    hidden = torch.stack([g[:, None, None] * first(i[None])[0] for g, i in zip(gates[0], x)]).tanh()
    expected = torch.stack([g[:, None, None] * last(h[None])[0] for g, h in zip(gates[1], hidden)])
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        *(torch.autograd.grad(y.square().sum(), (x, *model.embedding.parameters())) for y in (found, expected))
    ):
        torch.testing.assert_close(a, b)
    for routing, g in zip((calls[0] for calls in step.routings.values()), gates):
        torch.testing.assert_close(routing.dense(), g)
    if training:
        torch.testing.assert_close(step.losses()["sparsity"], 0.1 * sum(g.sum() for g in gates) / images)
    else:
        assert step.losses() == {}


def test_the_embedding_alone_must_tell_the_class() -> None:
    model = deep_moe(embedding_weight=0.5)
    with pytest.raises(RuntimeError, match="comes after forward"):
        model.embedding_loss(torch.tensor([1]))
    with pytest.raises(RuntimeError, match="call the DeepMoE around it"):
        model.backbone(torch.randn(1, 1, 32, 32))
    x, labels = torch.randn(3, 1, 32, 32), torch.tensor([1, 2, 3])
    model(x)
    logits = model.classifier(model.embedding(x))
    expected = -0.5 * logits.log_softmax(-1)[torch.arange(3), labels].mean()
    torch.testing.assert_close(model.embedding_loss(labels), expected)


def test_frozen_gates_stay_and_the_rest_is_tuned() -> None:
    model = deep_moe()
    model.freeze_gates()
    with record(model) as step:
        loss = model(torch.randn(3, 1, 32, 32)).square().sum() + sum(step.losses().values())
    loss.backward()
    for name, parameter in model.named_parameters():
        gate = name.startswith(("embedding.", "classifier.")) or ".router." in name
        assert (parameter.grad is None) == gate, name


def test_deep_moe_compiled_and_checkpointed_is_the_same() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    same_step(
        DeepMoE(backbone, 3, embedding_dim=4, layers=("*",)).double(), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_saved_state_and_a_copy_give_the_same_channels(training: bool) -> None:
    model, other = deep_moe().train(training), deep_moe(9).train(training)
    x = torch.randn(3, 1, 32, 32)
    other.load_state_dict(model.state_dict())
    expected = model(x)
    assert torch.equal(other(x), expected)
    for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert twin._passing.value is None
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_no_image_and_images_without_any_channel(training: bool) -> None:
    backbone = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    model = DeepMoE(backbone, 3, embedding_dim=4, layers=("*",)).train(training)
    for x in (torch.randn(0, 2, 8, 8), torch.zeros(2, 2, 8, 8)):
        if len(x):
            for module in model.embedding.modules():
                if isinstance(module, nn.Conv2d):
                    module.bias.data.fill_(-1.0)  # type: ignore[union-attr]
        with record(model) as step:
            y = model(x)
        assert y.shape == (len(x), 4, 4, 4)
        assert not y.any()
        (y.sum() + sum(step.losses().values())).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert all(not calls[0].counts.any() for calls in step.routings.values())


def filtered() -> tuple[Tensor, Tensor, Tensor]:
    """Maps [128, 9, 8, 8]: noise beside its kind of eight, that kind, and the noise through the kind's own filter."""
    kind, filters, noise = torch.randint(8, (128,)), torch.randn(8, 1, 3, 3) / 3, torch.randn(128, 1, 8, 8)
    target = torch.cat([F.conv2d(noise[i : i + 1], filters[k][None], padding=1) for i, k in enumerate(kind)])
    return torch.cat([noise, torch.eye(8)[kind][..., None, None].expand(-1, -1, 8, 8)], dim=1), kind, target


def fitted(model: nn.Module) -> tuple[float, float]:
    """Share of the target's variance that is left after training, and channels an image used of a DeepMoE."""
    torch.manual_seed(3)
    x, kind, target = filtered()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(200):
        with record(model) as step:
            error = (model(x) - target).square().mean()
        loss = error + sum(step.losses().values())
        if isinstance(model, DeepMoE):
            loss = loss + model.embedding_loss(kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    used = sum(int(calls[0].counts.sum()) for calls in step.routings.values()) / len(x)
    return float(error.detach() / target.var()), used


def test_channels_become_specialists() -> None:
    """Using no more channels an image than a plain network has, DeepMoE's error is below half of that one's."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(9, 16, 3, padding=1), nn.Conv2d(16, 1, 1))
    embedding = shallow_embedding(9, 16, depth=2)
    error, used = fitted(DeepMoE(backbone, 8, embedding_dim=16, embedding=embedding, layers=("0",)))
    plain, _ = fitted(nn.Sequential(nn.Conv2d(9, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1)))
    assert used <= 4
    assert error < plain / 2, f"{error:.3f} against {plain:.3f} of four channels"


def test_a_converted_resnet_learns_digits() -> None:
    """A timm ResNet with gated channels, and experts of patches in place of its last stage: these must learn.

    A classifier on what they give untrained gets less than 0.4 in as many steps.
    """
    torch.manual_seed(0)
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    backbone = resnet()
    backbone.conv1, backbone.maxpool = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.Identity()  # for 8 x 8 images
    backbone.layer4 = PatchMoE(
        PatchRouter(16, 4, 2), [nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU()) for _ in range(4)], patch_size=1
    )
    model = DeepMoE(backbone, 10, embedding_dim=32, layers=("layer[12]*.conv?",))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step_number in range(80):
        batch = order[: len(order) // 2].roll(-64 * step_number)[:64]
        with record(model) as step:
            loss = F.cross_entropy(model(images[batch]), labels[batch]) + model.embedding_loss(labels[batch])
        optimizer.zero_grad()
        (loss + sum(step.losses().values())).backward()
        optimizer.step()
    assert {"backbone.layer4", "backbone.layer1.0.conv1"} <= set(step.routings)
    unseen = order[len(order) // 2 :]
    with torch.no_grad():
        right = (model.eval()(images[unseen]).argmax(-1) == labels[unseen]).float().mean()
    assert right > 0.8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchRouter(4, 3, 0), "patches must be at least 1, got 0"),
        (lambda: PatchRouter(4, 3, 1, softmax="experts"), "softmax must be over 'chosen' or 'tokens'"),  # type: ignore[arg-type]
        (lambda: PatchRouter(4, 3, 1, group_size=4), "group_size has no meaning"),
        (lambda: PatchMoE(PatchRouter(4, 3, 1), [nn.Identity()], 2), "routes 3 experts, got 1"),
        (lambda: patch_layer()(torch.randn(1, 2, 5, 4)), r"whole patches of 2 x 2.*got \[1, 2, 5, 4\]"),
        (lambda: patch_layer()(torch.randn(1, 3, 4, 4)), "router's width 8"),
        (lambda: DeepMoE(resnet(), 10, layers=("stem",)), r"no convolution matches \['stem'\]; there are: conv1, "),
    ],
)
def test_what_does_not_fit_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

"""LIMoE: what it computes, what its gates hear, how large it is, and its way to a folder and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import zoo
from zoo.models import count_parameters
from zoo.models.limoe import LIMoE
from zoo.moe import Blend, MoE, Router, Slots, record, telemetry
from zoo.moe.routers import SoftRouter, TopKRouter

TINY = "vision_language/limoe_tiny"
LENGTHS = (7, 16, 1)


def make(**overrides: Any) -> Any:
    model = zoo.create_model(TINY, **overrides).double()
    for parameter in model.parameters():  # away from zeros and from experts that start alike
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() else None
    return model


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(64, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), 1, 16, 16, dtype=torch.float64), ids, mask


def by_hand(model: LIMoE, x: Tensor, head: Tensor) -> Tensor:
    """One image or one text without padding, tokens x [S, D], through the tower: a transcription."""

    def norm(layer: Any, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias

    def gelu(x: Tensor) -> Tensor:
        return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    for block in model.blocks:
        attn, h = block.attn, norm(block.norm1, x)
        q, k, v = (h @ attn.qkv.weight.T + attn.qkv.bias).view(len(x), 3, attn.num_heads, -1).unbind(1)
        heads = []
        for i in range(attn.num_heads):
            weight = (q[:, i] @ k[:, i].T / q.shape[-1] ** 0.5).softmax(-1)
            heads.append(weight @ v[:, i])
        x = x + torch.cat(heads, -1) @ attn.proj.weight.T + attn.proj.bias
        h = norm(block.norm2, x)
        if not isinstance(block.mlp, MoE):
            x = x + gelu(h @ block.mlp.fc1.weight.T + block.mlp.fc1.bias) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
            continue
        e, out = block.mlp.experts, []
        for token in h:
            probs = (block.mlp.router.weight @ token).softmax(0)
            i = int(probs.argmax())
            inner = gelu(e.up_proj[i] @ token + e.up_proj_bias[i])
            out.append(probs[i] * (e.down_proj[i] @ inner + e.down_proj_bias[i]))
        x = x + torch.stack(out)
    pooled = head @ norm(model.norm, x).mean(0)
    return pooled / pooled.norm()


def test_it_is_one_tower_as_transcribed() -> None:
    model = make().eval()
    image, ids, mask = batch()
    out = model(image, ids, mask)
    for i, length in enumerate(LENGTHS):
        patches = F.conv2d(image[i : i + 1], model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=4)
        expected = by_hand(model, patches[0].flatten(1).T + model.image_positions[0], model.image_head.weight)
        torch.testing.assert_close(out.image[i], expected)
        tokens = model.token_embed.weight[ids[i, :length]] + model.text_positions[0, :length]
        torch.testing.assert_close(out.text[i], by_hand(model, tokens, model.text_head.weight))
    torch.testing.assert_close(out.logits, 10 * out.image @ out.text.T)  # a temperature of 0.1


def test_a_modality_alone_has_the_same_embeddings_and_padding_changes_nothing() -> None:
    model = make().eval()
    image, ids, mask = batch()
    out = model(image, ids, mask)
    torch.testing.assert_close(model(image).image, out.image)
    torch.testing.assert_close(model(ids=ids.where(mask, 63), mask=mask).text, out.text)
    torch.testing.assert_close(model(ids=ids[:1, :7]).text, out.text[:1])
    assert model(image).text is None
    empty = model(ids=ids, mask=torch.zeros_like(mask)).text
    assert empty.isfinite().all()
    nobody = model(image[:0], ids[:0], mask[:0])  # a process whose part of the last batch is empty
    assert nobody.image.shape == nobody.text.shape == (0, 64)


@pytest.mark.parametrize("routed", ["together", "apart"])
def test_gates_hear_modality_and_padding(routed: str) -> None:
    heard: list[dict[str, Any]] = []

    class Spy(TopKRouter):
        def forward(self, x: Tensor, **context: Any) -> Any:
            heard.append({"tokens": x.shape[:2], **context})
            return super().forward(x, **context)

    model = make(router=Spy, routed=routed, moe_layers=[1])
    model(*batch())
    mask = batch()[2]
    if routed == "together":
        (call,) = heard
        assert call["tokens"] == (3, 32)
        assert call["modality"].tolist() == [[0] * 16 + [1] * 16] * 3
        assert torch.equal(call["mask"], torch.cat([torch.ones(3, 16).bool(), mask], 1))
    else:
        assert [(c["tokens"], c["modality"]) for c in heard] == [((3, 16), 0), ((3, 16), 1)]
        assert heard[0]["mask"] is None
        assert torch.equal(heard[1]["mask"], mask)


def test_both_modalities_compete_for_places_by_priority() -> None:
    """With one place an expert the surest token of either modality has it; apart, the surest of each."""
    gate = {"name": "TopKRouter", "noise": None, "losses": None}
    for routed, groups in (("together", 1), ("apart", 2)):
        model = make(router=gate, capacity={"tokens": 1, "multiple_of": 1, "drop": "priority"}, routed=routed)
        with record(model) as step:
            model(*batch())
        for calls in step.routings.values():
            assert len(calls) == groups
            for routing in calls:
                best, sure = routing.probs.max(-1)
                wanted = telemetry.asked_per_token(routing) > 0
                for expert in set(sure[wanted].tolist()):
                    mine = (sure == expert) & wanted
                    first, last = routing.offsets[expert : expert + 2]
                    assert last - first == 1
                    assert int(routing.token_index[first]) == int(best.where(mine, -1).argmax())


def test_gates_that_mix_tokens_route_modalities_apart() -> None:
    model = make(router="SoftRouter").eval()
    assert model.routed == "apart"
    image, ids, mask = batch()
    out = model(image, ids, mask)
    torch.testing.assert_close(model(image, ids.flip(0), mask.flip(0)).image, out.image)  # no caption shows through
    with pytest.raises(ValueError, match="would see its own caption"):
        make(router="SoftRouter", routed="together")


class Mixture(Router):
    """Slots of one's own: every slot is the mean of a sequence, every token the mean of the slots."""

    def forward(self, x: Tensor, **context: Any) -> Slots:
        groups, size, _ = x.shape
        even = x.new_ones(groups, size, self.num_experts, 1)
        return Slots(even / size, even / self.num_experts, groups * size)


class Average(Router):
    """The plain mean of the experts, whatever the tokens are."""

    merges = True

    def forward(self, x: Tensor, **context: Any) -> Blend:
        groups, size, _ = x.shape
        offsets = torch.arange(groups + 1, dtype=torch.int32) * size
        return Blend(x.new_full((groups, self.num_experts), 1 / self.num_experts), offsets, groups * size)


def soft(dim: int, num_experts: int) -> Router:
    return SoftRouter(dim, num_experts, slots=1)


def single(dim: int, num_experts: int) -> Router:
    return TopKRouter(dim, num_experts, 1)


@pytest.mark.parametrize(("router", "routed"), [(Average, "apart"), (soft, "apart"), (single, "together")])
def test_a_gate_of_ones_own_that_mixes_tokens_never_lets_an_image_see_its_caption(router: Any, routed: str) -> None:
    model = make(router=router)
    assert model.routed == routed
    image, ids, _ = batch()
    with torch.no_grad():
        first = model(image, ids).image
        assert (first - model(image, (ids + 1) % 64).image).abs().max() < 1e-12
    if routed == "apart":
        with pytest.raises(ValueError, match="an image would see its own caption"):
            make(router=router, routed="together")


def test_a_gate_that_does_not_say_that_it_mixes_tokens_is_refused_when_it_does() -> None:
    image, ids, mask = batch()
    with pytest.raises(ValueError, match=r"Mixture mixes tokens, .* make the model with routed='apart'"):
        make(router=Mixture)(image, ids, mask)
    assert make(router=Mixture, routed="apart")(image, ids, mask).image.shape[0] == len(image)


def test_the_losses_are_those_of_the_paper() -> None:
    model = make()
    with record(model) as step:
        model(*batch())
    assert set(step.losses()) == {"importance_vmoe", "load_vmoe", "z", "local_entropy", "global_entropy"}
    router = model.blocks[1].mlp.router
    assert router.k == 1
    assert router.capacity.drop == "priority"
    assert router.losses.terms["global_entropy"].options["minimum"] == [5.0, 2.25]  # 20 and 9 of 32, for 8
    gates = zoo.create_model(TINY, router={"name": "TopKRouter", "k": 2}, losses={"z": 1.0}, capacity=2.0)
    router = gates.blocks[3].mlp.router
    assert (router.k, router.capacity.factor, list(router.losses.terms)) == (2, 2.0, ["z"])


def test_checkpointing_gives_the_same_gradients() -> None:
    model, inputs = make(router={"name": "TopKRouter", "noise": None}), batch()
    found = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        with record(model) as step:
            loss = model(*inputs).logits.diag().sum()
            (loss + sum(step.losses().values())).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(float(g.abs().max()) > 0 for g in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def closed_form(
    width: int, depth: int, sparse: int, patch: int, vocab: int = 32_000, text: int = 16, experts: int = 32
) -> tuple[int, int]:
    """All parameters and those of one token, from the sizes: attention, norms, MLPs, gates, ends."""
    mlp = 2 * width * 4 * width + 5 * width
    block = 4 * width * width + 4 * width + 4 * width
    ends = vocab * width + 3 * patch * patch * width + width + 2 * width + 2 * width * width + 1
    places = ((224 // patch) ** 2 + text) * width
    gates = sparse * experts * width
    shared = depth * block + ends + places + gates
    return shared + (depth - sparse) * mlp + sparse * experts * mlp, shared + depth * mlp


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("limoe_small_patch32", (512, 8, 4, 32)),
        ("limoe_base_patch32", (768, 12, 6, 32)),
        ("limoe_base_patch16", (768, 12, 6, 16)),
        ("limoe_large_patch16", (1024, 24, 12, 16)),
        ("limoe_huge_patch14", (1280, 32, 12, 14)),
    ],
)
def test_sizes(name: str, sizes: tuple[int, int, int, int]) -> None:
    with torch.device("meta"):
        model = zoo.create_model(f"vision_language/{name}")
        twin = zoo.create_model(f"vision_language/{name}", dense=True)
    assert count_parameters(model) == closed_form(*sizes)
    width, _, sparse, _ = sizes
    assert count_parameters(twin)[0] == closed_form(*sizes)[1] - sparse * 32 * width  # all but the gates
    if "huge" in name:  # what the paper says of it
        assert count_parameters(model)[0] / 1e9 == pytest.approx(5.6, abs=0.05)
        assert count_parameters(model)[1] / 1e6 == pytest.approx(675, abs=1)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"num_expert": 4}, "did you mean num_experts"),
        ({"image_size": 18}, "do not divide into patches of 4"),
        ({"num_heads": 5}, "does not divide into 5 heads"),
        ({"vocab_size": 0}, "vocab_size must be a whole number of at least 1"),
        ({"routed": "mixed"}, "'together' or 'apart'"),
        ({"router": "TopKRoutr"}, "did you mean TopKRouter"),
        ({"losses": {"importanc": 1}}, "importance"),
        ({"moe_layers": [9]}, "no block 9"),
        ({"temperature": 0.0}, "above 0"),
    ],
)
def test_a_wrong_argument_is_named(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        zoo.create_model(TINY, **wrong)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({}, "got neither"),
        ({"image": torch.zeros(1, 3, 16, 16)}, r"expected images \[B, 1, H, W\] of 16x16"),
        ({"ids": torch.zeros(1, 17, dtype=torch.long)}, "at most 16 tokens"),
        ({"ids": torch.full((1, 2), 128)}, r"0\.\.127, got 128"),
        ({"ids": torch.zeros(1, 2, dtype=torch.long), "mask": torch.ones(1, 3)}, "mask has shape"),
    ],
)
def test_a_wrong_input_is_named(inputs: dict[str, Tensor], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        zoo.create_model(TINY)(**inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_gives_the_same_model_bit_for_bit(dtype: torch.dtype, tmp_path: Any) -> None:
    gate = {"router": {"name": "TopKRouter", "k": 2}, "num_experts": 4, "capacity": 1.5, "vocab_size": 50}
    model = zoo.create_model(TINY, **gate).to(dtype)
    zoo.save_pretrained(model, tmp_path / "a")
    found = zoo.from_pretrained(tmp_path / "a")
    assert not found.training
    assert found.made_with == model.made_with
    for name, tensor in model.state_dict().items():
        assert found.state_dict()[name].dtype == dtype
        assert torch.equal(found.state_dict()[name], tensor)
    zoo.save_pretrained(found, tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    wider = zoo.from_pretrained(tmp_path / "a", dtype="float64", capacity=3.0)
    assert next(wider.parameters()).dtype == torch.float64
    assert wider.blocks[1].mlp.router.capacity.factor == 3.0


def test_a_folder_that_does_not_fit_is_named(tmp_path: Any) -> None:
    zoo.save_pretrained(zoo.create_model(TINY), tmp_path / "a")
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor blocks.*has shape"):
        zoo.from_pretrained(tmp_path / "a", num_experts=4)
    with pytest.raises(ValueError, match=r"router=<function.* cannot be stored"):
        zoo.save_pretrained(zoo.create_model(TINY, router=lambda dim, num_experts: TopKRouter(dim, num_experts)), "b")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        zoo.from_pretrained(tmp_path / "a")


def test_a_folder_is_read_for_larger_images_and_other_channels(tmp_path) -> None:
    """Positions as bicubic interpolation with antialiasing has them; a grey image in all channels stays what it is."""
    model = make().eval()
    zoo.save_pretrained(model, tmp_path / "a")
    larger = zoo.from_pretrained(tmp_path / "a", image_size=24, channels=3)
    table = model.image_positions.unflatten(1, (4, 4)).permute(0, 3, 1, 2).float()
    expected = F.interpolate(table, size=(6, 6), mode="bicubic", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(larger.image_positions, expected.double(), rtol=0, atol=1e-6)
    kernel = larger.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(kernel, model.patch_embed.proj.weight, rtol=1e-5, atol=1e-6)  # timm adapts in float32
    coloured = zoo.from_pretrained(tmp_path / "a", channels=3)
    grey, ids, mask = batch()
    torch.testing.assert_close(coloured(grey.expand(-1, 3, -1, -1)).image, model(grey).image, rtol=1e-5, atol=1e-5)
    assert torch.equal(larger(ids=ids, mask=mask).text, model(ids=ids, mask=mask).text)
    zoo.save_pretrained(larger, tmp_path / "b")
    assert torch.equal(zoo.from_pretrained(tmp_path / "b").image_positions, larger.image_positions)
    with pytest.raises(ValueError, match="text_positions has shape"):
        zoo.from_pretrained(tmp_path / "a", text_length=20)


def test_a_folder_is_read_for_larger_patches_which_see_the_same_in_enlarged_images(tmp_path: Any) -> None:
    model = make().eval()
    zoo.save_pretrained(model, tmp_path / "a")
    larger = zoo.from_pretrained(tmp_path / "a", patch_size=8, image_size=32)
    patches = torch.randn(5, 1, 4, 4)
    enlarged = F.interpolate(patches, size=(8, 8), mode="bicubic", antialias=True)
    found = F.conv2d(enlarged.double(), larger.patch_embed.proj.weight, larger.patch_embed.proj.bias)
    expected = F.conv2d(patches.double(), model.patch_embed.proj.weight, model.patch_embed.proj.bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # timm adapts in float32
    assert torch.equal(larger.image_positions, model.image_positions)


@pytest.mark.parametrize("how", ["upcycle", "split", "both"])
def test_an_upcycled_or_split_one_is_saved_and_read(how: str, tmp_path: Any) -> None:
    model = zoo.create_model(TINY, dense=True, vocab_size=64).eval()
    if how != "upcycle":
        model = zoo.split(model, layers=[0], num_experts=4, k=2)
    if how != "split":
        model = zoo.upcycle(model, layers=[1], num_experts=3, k=1)
    zoo.save_pretrained(model, tmp_path / "a")
    found = zoo.from_pretrained(tmp_path / "a")
    image, ids, mask = batch()
    with torch.no_grad():
        ours, theirs = (m(image.float(), ids, mask) for m in (model, found))
    assert torch.equal(ours.image, theirs.image)
    assert torch.equal(ours.text, theirs.text)
    zoo.save_pretrained(found, tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_one_that_was_changed_by_hand_is_refused(tmp_path: Any) -> None:
    model = zoo.create_model(TINY)
    model.image_head = torch.nn.Linear(model.image_head.in_features, 3)
    with pytest.raises(ValueError, match=r"has other tensors \(image_head.bias\)"):
        zoo.save_pretrained(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()

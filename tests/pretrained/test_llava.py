"""A LLaVA joined of a language model and a vision tower that transformers has written."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

import zoo
from zoo.models.moe_llava import stage
from zoo.pretrained.llava import join

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a Phi of 61 tokens, a whole CLIP, a SigLIP tower and a ViT."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(random.randrange(1 << 30))
    text = AutoConfig.for_model("phi", **SIZES, vocab_size=61, max_position_embeddings=64)
    seen = {**SIZES, "image_size": 16, "patch_size": 4}
    read = {**SIZES, "vocab_size": 20, "max_position_embeddings": 8}
    made = {
        "phi": AutoModelForCausalLM.from_config(text),
        "clip": CLIPModel(CLIPConfig(vision_config=seen, text_config=read, projection_dim=8)),
        "siglip": SiglipVisionModel(SiglipVisionConfig(**seen)),
        "vit": ViTModel(ViTConfig(**seen)),
    }
    made["phi"].lm_head.bias.data.normal_()  # which no LLaVA has
    for name, model in made.items():
        model.save_pretrained(folder / name)
    made["phi"].lm_head.bias.data.zero_()
    return folder, {name: model.eval() for name, model in made.items()}


@pytest.mark.parametrize(("tower", "tokens"), [("clip", 16), ("siglip", 16)])
def test_the_parts_compute_what_they_did(parts, tower: str, tokens: int, tmp_path) -> None:
    folder, made = parts
    model = join(folder / "phi", folder / tower)
    ids = torch.randint(0, 60, (2, 9))
    torch.testing.assert_close(model(input_ids=ids).logits, made["phi"](input_ids=ids).logits)
    # An image's tokens are the projector's of the features before the last layer, without the class token.
    image = torch.rand(1, 3, 16, 16)
    vision = made["clip"].vision_model if tower == "clip" else made["siglip"]
    features = vision(image, output_hidden_states=True).hidden_states[-2]
    features = features[:, 1:] if tower == "clip" else features
    p = model.model.multi_modal_projector
    projected = torch.nn.functional.gelu(features @ p.linear_1.weight.T + p.linear_1.bias)
    projected = projected @ p.linear_2.weight.T + p.linear_2.bias
    assert projected.shape == (1, tokens, 32)
    embedded = made["phi"].get_input_embeddings()(ids[:1])
    expected = made["phi"](inputs_embeds=torch.cat([projected, embedded], 1)).logits
    seen = torch.cat([torch.full((1, tokens), 60), ids[:1]], 1)
    torch.testing.assert_close(model(input_ids=seen, pixel_values=image).logits, expected, rtol=1e-4, atol=1e-5)

    stage(model, 1)
    assert {n for n, q in model.named_parameters() if q.requires_grad} == {
        f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    zoo.save_pretrained(model, tmp_path / "joined")
    again = zoo.from_pretrained(tmp_path / "joined")
    assert torch.equal(
        again(input_ids=seen, pixel_values=image).logits, model(input_ids=seen, pixel_values=image).logits
    )


def test_room_for_more_tokens(parts) -> None:
    folder, made = parts
    model = join(folder / "phi", folder / "clip", vocab_size=64)
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == 64
    assert model.config.image_token_id == 63
    ids = torch.randint(0, 61, (1, 5))
    torch.testing.assert_close(model(input_ids=ids).logits[..., :61], made["phi"](input_ids=ids).logits)


def test_what_cannot_be_joined_is_said(parts, tmp_path) -> None:
    folder, _ = parts
    with pytest.raises(ValueError, match=r"vision tower in .*vit.*clip_vision_model"):
        join(folder / "phi", folder / "vit")
    with pytest.raises(ValueError, match=r"vocab_size=60: .* has 61 tokens"):
        join(folder / "phi", folder / "clip", vocab_size=60)
    with pytest.raises(FileNotFoundError):
        join(tmp_path / "none", folder / "clip")

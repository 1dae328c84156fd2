"""What a vision-language model answers to a question about images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zoo.data.pictures import in_mode, open_picture


def open_processor(source: str) -> Any:
    """transformers' processor of a model folder or hub repository: its tokenizer, chat template and image preparation.

    Raises ValueError where there is none.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: no processor of images and text ({error})") from error
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"{source}: a {type(processor).__name__} has no image processor; is it a language model's?")
    return processor


def processor_of(model: Any) -> str | None:
    """The folder that a model was read from, where its processor lies beside it."""
    folder = getattr(model, "name_or_path", None)
    names = ("processor_config.json", "preprocessor_config.json")
    return folder if folder and any((Path(folder) / name).is_file() for name in names) else None


def open_image(path: str | Path) -> Any:
    """An image in RGB; raises FileNotFoundError and ValueError naming the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no image {str(path)!r} (from {Path.cwd()})")
    try:
        return in_mode(open_picture(path), "RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: not an image that can be read ({error})") from error


def prepare(processor: Any, images: Sequence[Any], text: str, system: str | None = None) -> dict[str, Any]:
    """The model's inputs for images and a text about them: a user's turn where the model has a chat template.

    system: what the system says before it; only a chat template has a place for it.
    """
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        turns = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
        turns.append({"role": "user", "content": content})
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return dict(processor.apply_chat_template(turns, **options))
    prompt = "".join(f"{processor.image_token}\n" for _ in images) + text
    return dict(processor(images=list(images), text=prompt, return_tensors="pt"))


def check_length(model: Any, inputs: dict[str, Any], more: int) -> None:
    """Raise ValueError where inputs, and as many tokens as are to follow, are longer than the model's context."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ids = inputs["input_ids"]
    if limit is None or ids.shape[1] + more <= limit:
        return
    token = getattr(model.config, "image_token_id", None)
    seen = int((ids == token).sum()) if token is not None else 0
    raise ValueError(
        f"{ids.shape[1]} tokens, {seen} of them of images, and {more} to write are more than the model's context of "
        f"{limit}; shorten the text, take fewer images, or write fewer tokens"
    )


@torch.no_grad()
def answer(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    text: str,
    max_new_tokens: int = 128,
    system: str | None = None,
    told: Mapping[str, Any] | None = None,
) -> str:
    """The likeliest answer, without the question; `told` goes to `generate` too.

    Raises as `check_length`, and where image tokens fit no image.
    """
    inputs = prepare(processor, images, text, system)
    check_length(model, inputs, max_new_tokens)
    tokenizer = processor.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    on_device = {key: v.to(model.device) if isinstance(v, torch.Tensor) else v for key, v in inputs.items()}
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": padding}
    out = model.generate(**on_device, **options, **(told or {}))
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

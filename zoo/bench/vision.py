"""`zoo bench vision`: a V-MoE against the dense ViT that does the same multiplications, and against rivals.

Whole models on random images, B/16 shapes by default, with experts in every second block: a V-MoE that drops no token
beside a ViT whose MLPs there are as wide as the experts that a token meets, and a Soft MoE with a slot a token beside
the ViT itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from .turns import Contestant, compare, device_of, file_to_write, machine, measure, show

MODEL = "vmoe_base_patch16_224"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="zoo bench vision", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=MODEL, help=f"a V-MoE of zoo models 'vision/vmoe*' (default {MODEL})")
    parser.add_argument("--batch", type=int, default=8, help="images (default 8: one routing group)")
    parser.add_argument("--depth", type=int, default=None, help="blocks, where the model's own are too many")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant (default 5)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the figures to FILE")
    args = parser.parse_args(argv)
    for name, least in (("batch", 1), ("repeats", 1), ("depth", 2)):  # every second block has experts
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name} {value}: expected at least {least}")
    return args


def fields(args: argparse.Namespace, device: str) -> dict[str, list[Contestant]]:
    """What is compared: each mixture with the dense model that does the same multiplications, and with its rivals."""
    import torch

    import zoo

    options: dict[str, Any] = {"moe_layers": "every-2", **({} if args.depth is None else {"depth": args.depth})}
    soft = {**options, "num_experts": 8, "router": "SoftRouter"}

    def contestant(name: str, group: str, model: Any = None, **kinds: Any) -> Contestant:
        torch.manual_seed(0)
        model = zoo.create_model(f"vision/{args.model}", **kinds) if model is None else model
        model = model.to(device, getattr(torch, args.dtype)).train()
        images = torch.randn(args.batch, *size, device=device, dtype=getattr(torch, args.dtype))
        return Contestant(name, group, lambda: model(images), list(model.parameters()))

    like: Any = zoo.create_model(f"vision/{args.model}", dense=True, k=1, **options)
    size = like.default_cfg["input_size"]
    found = {
        "V-MoE": [
            contestant("dense", "limit", dense=True, **options),
            contestant("zoo V-MoE", "zoo", capacity=float("inf"), **options),
        ],
        "Soft MoE": [
            contestant("dense", "limit", like),
            contestant("zoo Soft MoE", "zoo", **soft),
        ],
    }
    if find_spec("soft_moe"):
        found["Soft MoE"].append(contestant("soft-moe (PyPI)", "rival", _rival(like)))
    return found


def _rival(like: Any) -> Any:
    """The Soft MoE of the package soft-moe, of the same sizes."""
    from soft_moe import SoftMoEVisionTransformer

    patches = like.patch_embed.num_patches
    return SoftMoEVisionTransformer(
        num_experts=8,
        slots_per_expert=round(patches / 8),
        moe_layer_index=list(range(1, len(like.blocks), 2)),
        img_size=like.patch_embed.img_size[0],
        patch_size=like.patch_embed.patch_size[0],
        num_classes=like.num_classes,
        embed_dim=like.embed_dim,
        depth=len(like.blocks),
        num_heads=like.blocks[0].attn.num_heads,
        global_pool="avg",
        class_token=False,
    )


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit status."""
    args = _parse(argv)
    device = device_of(args.device)
    results = []
    for kind, everyone in fields(args, device).items():
        for backward, what in ((False, "forward"), (True, "forward + backward")):
            rows = compare(everyone, measure(everyone, args.repeats, backward, device))
            for row in rows:
                row["images_per_second"] = 1e3 * args.batch / row["ms"]
            show(f"{kind}: {args.model}, {args.batch} images, {args.dtype}, {what}", rows)
            results.append({"kind": kind, "what": what, "rows": rows})
    if args.json:
        facts = {"model": args.model, "batch": args.batch, "depth": args.depth, "dtype": args.dtype}
        args.json.write_text(json.dumps({"machine": machine(device), **facts, "results": results}, indent=1) + "\n")
        print(f"\nwritten to {args.json}")
    return 0

"""What a dense model loses when only some of its neurons are computed: its MLPs cut into experts, way by way.

python scripts/split_dense.py my/llama --text README.md --experts 16
python scripts/split_dense.py vit_small_patch16_224.augreg_in21k --images my/images/ --methods cluster coactivation

The model is a folder that transformers wrote (with a tokenizer, where there is --text), or the name of a timm model.
Prints for each way to cut, each gate and each number of experts a token meets the error of the outputs, on data that
nothing was learnt from: |sparse - dense| / |dense| over all logits. Without data of one's own tokens and images are
random.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import zoo
from tasks.cli import run_script
from tasks.numbers import count
from tasks.vision_models import check_timm
from zoo.convert import set_k
from zoo.convert.split_predictor import oracle

METHODS = ("random", "cluster", "coactivation")
GATES = ("EMoERouter", "MoEficationRouter", "ground truth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder of transformers, or a model of timm")
    parser.add_argument("--text", help="a text file, for a language model")
    parser.add_argument("--images", help="a folder of images, in folders or not, for a timm model")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--layers", default="all", help='which MLPs: "all", "every-2", "last-2"')
    parser.add_argument("--experts", type=count, default=16)
    parser.add_argument("--batches", type=int, default=8, help="half of them to learn from, half to measure on")
    parser.add_argument("--batch-size", type=count, default=8)
    parser.add_argument("--length", type=count, default=128, help="tokens of a sequence")
    parser.add_argument("--scratch", action="store_true", help="do not fetch timm's weights")
    args = parser.parse_args()
    if args.batches < 2:
        parser.error(f"--batches must be at least 2, one to learn from and one to measure on, got {args.batches}")

    torch.manual_seed(0)
    model, batches = language(args) if Path(args.model).is_dir() else vision(args)
    learnt, measured = batches[::2], batches[1::2]
    expected = [logits(model, x) for x in measured]
    choices = sorted({max(1, round(args.experts * share)) for share in (0.125, 0.25, 0.5, 0.75, 1.0)})
    print("method        gate               " + "".join(f"{k / args.experts:>8.0%}" for k in choices) + "  of neurons")
    for method in args.methods:
        cut: dict[str, Any] = {}
        for gate in GATES:
            if gate != "ground truth":
                torch.manual_seed(0)  # the same cut for all gates
                how = {"method": method, "router": gate, "k": choices[0], "calibrate": losses(learnt)}
                cut[gate] = zoo.split(model, args.layers, args.experts, **how)
            sparse = cut.get(gate, cut["EMoERouter"])
            row = []
            for k in choices:
                set_k(sparse, k)
                row.append(error(sparse, measured, expected, gate == "ground truth"))
            print(f"{method:<14}{gate:<19}" + "".join(f"{value:>8.3f}" for value in row))


def language(args: argparse.Namespace) -> tuple[Any, list[torch.Tensor]]:
    """A language model of transformers, and batches of token ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    shape = (args.batches, args.batch_size, args.length)
    if args.text is None:
        return model, list(torch.randint(model.config.vocab_size, shape))
    text = Path(args.text).read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(args.model)(text)["input_ids"])
    needed = args.batches * args.batch_size * args.length
    if ids.numel() < needed:
        raise ValueError(
            f"{args.text}: expected at least {needed} tokens for {args.batches} batches, got {ids.numel()}"
        )
    return model, list(ids[:needed].view(shape))


def vision(args: argparse.Namespace) -> tuple[Any, list[torch.Tensor]]:
    """A model of timm, and batches of images."""
    import timm
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    check_timm(args.model)
    model = timm.create_model(args.model, pretrained=not args.scratch).eval()
    config = resolve_data_config({}, model=model)
    if args.images is None:
        return model, list(torch.randn(args.batches, args.batch_size, *config["input_size"]))
    endings, needed = (".jpg", ".jpeg", ".png"), args.batches * args.batch_size
    paths = sorted(path for path in Path(args.images).rglob("*") if path.suffix.lower() in endings)
    if len(paths) < needed:
        raise ValueError(
            f"{args.images}: expected at least {needed} images for {args.batches} batches, got {len(paths)}"
        )
    transform, order = create_transform(**config), torch.randperm(len(paths))[:needed].tolist()
    images = torch.stack([transform(Image.open(paths[i]).convert("RGB")) for i in order])
    return model, list(images.view(args.batches, args.batch_size, *images.shape[1:]))


def losses(batches: list[torch.Tensor]) -> Callable[[Any], Iterator[torch.Tensor]]:
    """What `zoo.split` asks for as `calibrate`: runs a model over the batches."""
    return lambda model: (outputs(model, x).square().mean() for x in batches)


def outputs(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model(x) if x.is_floating_point() else model(x, use_cache=False).logits


@torch.no_grad()
def logits(model: Any, x: torch.Tensor) -> torch.Tensor:
    return outputs(model, x).float()


def error(sparse: Any, batches: list[torch.Tensor], expected: list[torch.Tensor], truth: bool) -> float:
    """|sparse - dense| / |dense| over all batches; `truth` lets experts be chosen by what they are going to compute."""
    away = size = 0.0
    for x, theirs in zip(batches, expected):
        with oracle(sparse) if truth else nullcontext():
            ours = logits(sparse, x)
        away += float((ours - theirs).square().sum())
        size += float(theirs.square().sum())
    return (away / size) ** 0.5


if __name__ == "__main__":
    run_script(main)

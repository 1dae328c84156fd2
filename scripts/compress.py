"""Make a sparse language model smaller or dense, and tell what that costs before any training makes up for it.

python scripts/compress.py my-model my/texts/ --keep 4 --out pruned
python scripts/compress.py my-model my/texts/ --dense average --weights usage --out dense
python scripts/continue_language.py pruned my/texts/ --out healed
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

import zoo
from tasks.cli import run_script
from tasks.folders import check_free
from tasks.language import LanguageData, LanguageTask
from tasks.numbers import count


def batches(data: LanguageData, split: str, number: int, device: str) -> Iterator[dict[str, Any]]:
    """The first batches of a split, as the task has them."""
    rows = data.packed(split)
    for start in range(0, min(len(rows), number * data.batch_size), data.batch_size):
        chosen = [rows[i] for i in range(start, min(start + data.batch_size, len(rows)))]
        yield {name: torch.stack([row[name] for row in chosen]).to(device) for name in chosen[0]}


@torch.no_grad()
def loss(model: Any, data: LanguageData, number: int, device: str) -> float:
    """Nats a token over some batches of the validation split."""
    task, nats, tokens = LanguageTask(model.eval()), 0.0, 0
    for batch in batches(data, "val", number, device):
        nats += float(task.nats(batch).double().sum())
        tokens += int((batch["labels"] >= 0).sum())
    return nats / max(tokens, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub repository, with its tokenizer")
    parser.add_argument("source", nargs="*", help="text files, folders or patterns (default: Python's own source)")
    parser.add_argument("--out", required=True, help="folder for the result, in the family's own layout")
    parser.add_argument("--keep", type=count, help="experts that each layer keeps")
    parser.add_argument("--by", default="probs", help='scores of experts: "probs", "weight" or "counts"')
    parser.add_argument("--drop-blocks", type=int, default=0, help="whole blocks to leave out")
    parser.add_argument("--dense", help='make it dense: "average", "sum", "topk", "svd", "concatenate" or "used"')
    parser.add_argument("--weights", choices=["usage"], help="weigh experts by how much they are used")
    parser.add_argument("--shared", type=float, help="what takes the place of a shared expert's gate (Qwen2-MoE)")
    parser.add_argument("--width", type=count, help="neurons of the dense MLPs, filled up with zeros (DeepSeek)")
    parser.add_argument("--sequence-length", type=count, default=256)
    parser.add_argument("--batches", type=count, default=20, help="of 16 sequences, to calibrate and to evaluate with")
    args = parser.parse_args()
    if args.keep is None and not args.drop_blocks and not args.dense:
        parser.error("nothing to do: give --keep, --drop-blocks or --dense")
    check_free("--out", args.out)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = LanguageData(args.source or "stdlib", tokenizer=args.model, sequence_length=args.sequence_length)
    model = zoo.from_pretrained(args.model, device=device)

    def calibrate(model: Any) -> Iterator[torch.Tensor]:
        for batch in batches(data, "train", args.batches, device):
            yield LanguageTask(model).nats(batch).mean()

    steps = [("original", model)]
    if args.keep is not None or args.drop_blocks:
        options = {"keep": args.keep, "by": args.by, "drop_blocks": args.drop_blocks}
        steps.append(("pruned", zoo.prune(model, **options, calibrate=calibrate)))
    if args.dense:
        method = {"expert": "used"} if args.dense == "used" else args.dense
        gathered = {"weights": args.weights, "shared": args.shared, "width": args.width, "calibrate": calibrate}
        steps.append(("dense", zoo.to_dense(steps[-1][1], method=method, **gathered)))
    zoo.save_pretrained(steps[-1][1], args.out)
    data.tokenizer.save_pretrained(args.out)

    print(f"{'':<10}{'parameters':>14}{'nats a token':>14}")
    for name, made in steps:
        size = sum(parameter.numel() for parameter in made.parameters())
        print(f"{name:<10}{size:>14,}{loss(made, data, args.batches, device):>14.4f}")
    print(f"{type(steps[-1][1]).__name__} in {args.out}")


if __name__ == "__main__":
    run_script(main)

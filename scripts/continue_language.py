"""Train a pretrained model on, of any family that `zoo.from_pretrained` reads, from a folder or the hub.

python scripts/continue_language.py my-model my/texts/ --out my-model-2
"""

import argparse

import lightning.pytorch as pl

from tasks.cli import run_script
from tasks.folders import check_free
from tasks.language import LanguageData, LanguageTask
from tasks.numbers import count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub repository, with its tokenizer")
    parser.add_argument("source", nargs="*", help="text files, folders or patterns (default: Python's own source)")
    parser.add_argument("--out", required=True, help="folder for the result, in the family's own layout")
    parser.add_argument("--steps", type=count, default=100)
    parser.add_argument("--sequence-length", type=count, default=256)
    args = parser.parse_args()
    check_free("--out", args.out)

    data = LanguageData(args.source or "stdlib", tokenizer=args.model, sequence_length=args.sequence_length)
    task = LanguageTask(
        pretrained=args.model,
        losses={"switch": 0.01},  # keeps experts balanced while they learn
        lr=1e-4,
        warmup_steps=args.steps // 10,
        export=args.out,
    )
    pl.seed_everything(0)
    trainer = pl.Trainer(max_steps=args.steps, gradient_clip_val=1.0, limit_val_batches=20, default_root_dir="runs")
    trainer.fit(task, data)
    trainer.validate(task, data)


if __name__ == "__main__":
    run_script(main)

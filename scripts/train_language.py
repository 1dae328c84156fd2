"""Train a small mixture-of-experts language model from scratch on your own text.

python scripts/train_language.py my/texts/ --out my-model
"""

import argparse
import shlex

import lightning.pytorch as pl

from tasks.cli import run_script
from tasks.folders import check_free
from tasks.language import LanguageData, LanguageTask
from tasks.numbers import count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="*", help="text files, folders or patterns (default: Python's own source)")
    parser.add_argument("--out", default="runs/my-model", help="folder for model and tokenizer")
    parser.add_argument("--steps", type=count, default=500)
    parser.add_argument("--sequence-length", type=count, default=256)
    args = parser.parse_args()
    check_free("--out", args.out)

    data = LanguageData(args.source or "stdlib", tokenizer="bpe:4096", sequence_length=args.sequence_length)
    task = LanguageTask(
        "language/mixtral_tiny",
        # Anything about the model can be changed here, and any gate put in: see `zoo models --routers`.
        overrides={"num_hidden_layers": 2},
        router={"class_path": "zoo.moe.routers.TopKRouter", "init_args": {"k": 2, "score": "softmax_topk"}},
        losses={"switch": 0.01, "z": 0.001},
        lr=3e-3,
        warmup_steps=50,
        export=args.out,
    )
    pl.seed_everything(0)
    trainer = pl.Trainer(max_steps=args.steps, gradient_clip_val=1.0, limit_val_batches=20, default_root_dir="runs")
    trainer.fit(task, data)
    trainer.validate(task, data)
    print(f"saved to {args.out}; try: python scripts/generate.py {shlex.quote(args.out)} 'def '")


if __name__ == "__main__":
    run_script(main)

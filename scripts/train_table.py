"""Train a multi-task model on your own CSV or Parquet, whose columns a YAML file describes.

python scripts/train_table.py my-table.csv my-schema.yaml --out my-model

The schema is what configs/recommendation/table.yaml has under data.schema.
"""

import argparse

import lightning.pytorch as pl

from tasks.cli import run_script
from tasks.folders import check_free
from tasks.numbers import count
from tasks.recommendation import RecommendationData, RecommendationTask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="CSV or Parquet file, folder or pattern")
    parser.add_argument("schema", help="YAML file with features and tasks")
    parser.add_argument("--out", required=True, help="folder for the model")
    parser.add_argument("--network", default="recommendation/mmoe", help="see `zoo models 'recommendation/*'`")
    parser.add_argument("--steps", type=count, default=1000)
    parser.add_argument("--batch-size", type=count, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    check_free("--out", args.out)

    data = RecommendationData(args.source, args.schema, batch_size=args.batch_size)
    task = RecommendationTask(args.network, lr=args.lr, warmup_steps=args.steps // 20, export=args.out)
    pl.seed_everything(0)
    trainer = pl.Trainer(max_steps=args.steps, default_root_dir="runs")
    trainer.fit(task, data)
    trainer.test(task, data)
    print(f"saved to {args.out}; try: python scripts/score_table.py {args.out} new-rows.parquet --out scores.parquet")


if __name__ == "__main__":
    run_script(main)

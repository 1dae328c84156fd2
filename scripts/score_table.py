"""Score the rows of CSV or Parquet with a model that was trained on such a table; they need no labels.

python scripts/score_table.py my-model new-rows.parquet --out scores.parquet

Rows are read, scored and written batch by batch, in order. A score that runs for hours is better off with
`zoo recommendation predict --model.pretrained my-model --data.input new-rows.parquet`, which goes on where it was cut.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

import zoo
from tasks.cli import run_script
from tasks.numbers import count
from zoo.data.tables import open_files
from zoo.data.tables_stream import Stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("input", nargs="+", help="CSV or Parquet files, folders or patterns")
    parser.add_argument("--out", required=True, help="Parquet file of scores, a column a task")
    parser.add_argument("--batch-size", type=count, default=8192)
    args = parser.parse_args()

    out = Path(args.out)
    if out.exists():
        parser.error(f"{out} exists; name another file")

    model = zoo.from_pretrained(args.model)
    if not hasattr(model, "preparation"):
        parser.error(f"{args.model} is a {type(model).__name__}; expected a recommendation model")
    draft, writer = out.with_name(f".{out.name}.partial"), None  # named OUT once it is whole
    for batch in Stream(open_files(args.input), model.preparation, args.batch_size):
        with torch.inference_mode():
            scores = model.predictions(model(batch))
        table = pa.table({"row": batch.row.numpy(), **{name: values.numpy() for name, values in scores.items()}})
        writer = writer or pq.ParquetWriter(draft, table.schema)
        writer.write_table(table)
    if writer is None:
        raise SystemExit(f"{', '.join(args.input)}: expected rows to score, got none")
    writer.close()
    draft.replace(out)


if __name__ == "__main__":
    run_script(main)

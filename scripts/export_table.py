"""Export a recommendation model for serving: a graph of torch's own operators, which needs neither torchrec nor this.

python scripts/export_table.py my-model --out served
"""

import argparse

import zoo
from tasks.cli import run_script
from zoo.models.recommendation_export import GRAPH, export_graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("--out", required=True, help="folder for the graph, and how rows are encoded for it")
    args = parser.parse_args()

    export_graph(zoo.from_pretrained(args.model), args.out)
    print(f"{args.out}/{GRAPH}; load it with torch.export.load (see zoo.models.recommendation_export for its inputs)")


if __name__ == "__main__":
    run_script(main)

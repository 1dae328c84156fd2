"""Accuracy of a trained V-MoE against its computation, at many capacities of its experts, without training it again.

python scripts/plot_capacity.py my-model my/images/ --out capacity.svg
"""

import argparse
from pathlib import Path

import zoo
from tasks.capacity import FACTORS, trade_off
from tasks.cli import run_script
from tasks.folders import check_writable
from tasks.numbers import amount, count
from tasks.vision_data import VisionData, channels_of
from zoo.report.chart import Series
from zoo.report.picture import picture

NAMES = {"priority": "batch priority", "choice": "first come"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or prefix of a V-MoE checkpoint")
    parser.add_argument("source", nargs="?", default="digits", help="images as data.source has them")
    parser.add_argument("--split", default="test")
    parser.add_argument("--factors", type=amount, nargs="+", default=FACTORS, help="capacities to try")
    parser.add_argument("--choices", type=count, nargs="+", help="experts a token (default: the model's own)")
    parser.add_argument("--out", type=Path, default=Path("capacity.svg"))
    args = parser.parse_args()

    check_writable("--out", args.out.parent)
    model = zoo.from_pretrained(args.model)
    data = VisionData(args.source, channels=channels_of(model))
    points = trade_off(model, list(data.batches(args.split, model=model)), args.factors, args.choices)
    print("order           k  capacity   kept  Mmult/image  accuracy")
    for p in points:
        setting = f"{NAMES[p.drop]:<14}{p.k:>3}{p.factor:>10.2f}{p.kept:>7.1%}"
        print(f"{setting}{p.multiplications / 1e6:>13.3f}{p.accuracy:>10.1%}")
    series = [
        Series(
            f"{NAMES[drop]}, {k} experts a token",
            [(p.multiplications / 1e6, 100 * p.accuracy) for p in points if (p.drop, p.k) == (drop, k)],
            f"--c{number}",
        )
        for number, (drop, k) in enumerate(sorted({(p.drop, p.k) for p in points}))
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(picture(series, "million multiplications an image", "top-1 accuracy, %"))
    print(f"picture: {args.out}")


if __name__ == "__main__":
    run_script(main)

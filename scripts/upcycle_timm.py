"""Turn a dense timm model into a mixture of experts and train it on your own images (sparse upcycling, 2212.05055).

python scripts/upcycle_timm.py vit_small_patch16_224.augreg_in21k my/images/ --out my-model
"""

import argparse

import lightning.pytorch as pl

from tasks.cli import run_script
from tasks.folders import check_free
from tasks.numbers import count
from tasks.vision import VisionData, VisionTask
from zoo.data.images_transforms import Augment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model of timm: see timm.list_pretrained()")
    parser.add_argument("source", help="a folder with a folder a class, or a CSV file of paths and labels")
    parser.add_argument("--out", required=True, help="folder for the result")
    parser.add_argument("--layers", default="last-2", help='blocks that get experts: "last-2", "every-2"')
    parser.add_argument("--experts", type=count, default=8)
    parser.add_argument("--steps", type=count, default=500)
    parser.add_argument("--image-size", type=count, help="default: the model's")
    parser.add_argument("--batch-size", type=count, default=32)
    parser.add_argument("--scratch", action="store_true", help="do not fetch timm's weights")
    args = parser.parse_args()
    check_free("--out", args.out)

    augment = Augment(crop=(0.3, 1.0), flip=0.5)
    data = VisionData(args.source, image_size=args.image_size, batch_size=args.batch_size, augment=augment)
    how = {"model": args.model, "pretrained": not args.scratch, "layers": args.layers, "num_experts": args.experts}
    # Top-2 of copies, their weights summing to one, and no drops: the model starts exactly where the dense one was.
    task = VisionTask(upcycle=how, losses={"switch": 0.01}, lr=1e-4, layer_decay=0.8, warmup_steps=50, export=args.out)
    pl.seed_everything(0)
    trainer = pl.Trainer(max_steps=args.steps, gradient_clip_val=1.0, default_root_dir="runs")
    trainer.fit(task, data)
    trainer.validate(task, data)


if __name__ == "__main__":
    run_script(main)

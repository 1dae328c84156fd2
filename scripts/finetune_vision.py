"""Fine-tune a V-MoE on your own images: from an original checkpoint, a folder, or the hub.

python scripts/finetune_vision.py checkpoints/vmoe_s32_last2_ilsvrc2012_randaug_light1 my/images/ --out my-model
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
    parser.add_argument("model", help="prefix of a V-MoE checkpoint, folder or hub repository")
    parser.add_argument("source", help="a folder with a folder a class, or a CSV file of paths and labels")
    parser.add_argument("--out", required=True, help="folder for the result, in timm's layout")
    parser.add_argument("--steps", type=count, default=500)
    parser.add_argument("--image-size", type=count, help="default: the checkpoint's")
    parser.add_argument("--batch-size", type=count, default=32)
    args = parser.parse_args()
    check_free("--out", args.out)

    augment = Augment(crop=(0.3, 1.0), flip=0.5)
    data = VisionData(args.source, image_size=args.image_size, batch_size=args.batch_size, augment=augment)
    task = VisionTask(
        pretrained=args.model,
        overrides={"new_head": True},  # for other classes than those it was trained on
        optimizer="sgd",
        lr=3e-3,
        weight_decay=0.0,
        warmup_steps=args.steps // 20,
        export=args.out,
    )
    pl.seed_everything(0)
    trainer = pl.Trainer(max_steps=args.steps, gradient_clip_val=10.0, default_root_dir="runs")
    trainer.fit(task, data)
    trainer.validate(task, data)


if __name__ == "__main__":
    run_script(main)

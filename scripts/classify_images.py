"""Say what is on images, with a model from a folder, the hub, or an original V-MoE checkpoint.

python scripts/classify_images.py my-model my/images/ one.jpg
"""

import argparse

import torch
from torch.utils.data import DataLoader

import zoo
from tasks.cli import run_script
from tasks.numbers import count
from tasks.vision_data import VisionData, channels_of
from zoo.data.images import image_files
from zoo.data.images_rows import ImageRows, unlabelled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, hub repository, or prefix of a V-MoE checkpoint")
    parser.add_argument("images", nargs="+", help="files and folders")
    parser.add_argument("--batch-size", type=count, default=32)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = zoo.from_pretrained(args.model, device=device)
    if not hasattr(model, "pretrained_cfg"):
        parser.error(f"{args.model} is a {type(model).__name__}; expected a model of images")
    names = model.pretrained_cfg.get("label_names")
    files = image_files(args.images)
    wanted = VisionData(channels=channels_of(model)).preparation(model)
    for batch in DataLoader(ImageRows(unlabelled(files), wanted), args.batch_size):
        with torch.inference_mode():
            chances, classes = model(batch["image"].to(device)).softmax(-1).max(-1)
        for i, chance, label in zip(batch["index"].tolist(), chances.tolist(), classes.tolist()):
            print(f"{files[i]}\t{names[label] if names else label}\t{chance:.3f}")


if __name__ == "__main__":
    run_script(main)

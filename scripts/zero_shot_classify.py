"""Say which of some classes images show, by the names of the classes alone, with a model from a folder.

python scripts/zero_shot_classify.py my-model my/images/ one.jpg --classes "a seven" "a two"
python scripts/zero_shot_classify.py my-model my/images/ --classes cat dog --templates "a photo of a {}." "a {}"
"""

import argparse

import torch
from torch.utils.data import DataLoader

import zoo
from tasks.cli import run_script
from tasks.numbers import count
from tasks.zero_shot import class_embeddings
from zoo.data import open_tokenizer
from zoo.data.images import image_files
from zoo.data.images_rows import ImageRows, unlabelled
from zoo.data.images_transforms import Preparation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with a model and its tokenizer, as training exports them")
    parser.add_argument("images", nargs="+", help="files and folders")
    parser.add_argument("--classes", nargs="+", required=True, help="names to choose from")
    parser.add_argument("--templates", nargs="+", default=["{}"], help="what is said of a class; default %(default)s")
    parser.add_argument("--tokenizer", help="bytes, or another folder or hub repository")
    parser.add_argument("--batch-size", type=count, default=32)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = zoo.from_pretrained(args.model, device=device), open_tokenizer(args.tokenizer or args.model)
    classes, files = class_embeddings(model, tokenizer, args.classes, args.templates), image_files(args.images)
    wanted = Preparation(model.image_size, model.channels)
    for batch in DataLoader(ImageRows(unlabelled(files), wanted), args.batch_size):
        with torch.inference_mode():
            out = model(batch["image"].to(device))
            chances, best = (out.scale * out.image @ classes.T).softmax(-1).max(-1)
        for i, chance, label in zip(batch["index"].tolist(), chances.tolist(), best.tolist()):
            print(f"{files[i]}\t{args.classes[label]}\t{chance:.3f}")


if __name__ == "__main__":
    run_script(main)

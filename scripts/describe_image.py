"""Describe images with a vision-language model from a folder or the hub.

python scripts/describe_image.py my-model one.jpg two.png
"""

import argparse

import torch

import zoo
from tasks.answering import answer, open_image, open_processor
from tasks.cli import run_script
from tasks.numbers import count
from zoo.data.images import image_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub repository, with its processor")
    parser.add_argument("images", nargs="+", help="files and folders")
    parser.add_argument("--prompt", default="Describe this image.", help="what is asked of each; default %(default)s")
    parser.add_argument("--tokens", type=count, default=128, help="how many to write at most")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    files, processor = image_files(args.images), open_processor(args.model)
    model = zoo.from_pretrained(args.model, device=device)
    for file in files:
        print(f"{file}\t{answer(model, processor, [open_image(file)], args.prompt, args.tokens)}")


if __name__ == "__main__":
    run_script(main)

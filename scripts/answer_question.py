"""Answer a question about one or more images with a vision-language model from a folder or the hub.

python scripts/answer_question.py my-model "What is on the table?" photo.jpg
"""

import argparse

import torch

import zoo
from tasks.answering import answer, open_image, open_processor
from tasks.cli import run_script
from tasks.numbers import count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub repository, with its processor")
    parser.add_argument("question")
    parser.add_argument("images", nargs="+", help="files, seen together and in this order")
    parser.add_argument("--tokens", type=count, default=128, help="how many to write at most")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, processor = [open_image(path) for path in args.images], open_processor(args.model)
    model = zoo.from_pretrained(args.model, device=device)
    print(answer(model, processor, images, args.question, args.tokens))


if __name__ == "__main__":
    run_script(main)

"""Continue prompts with a model from a folder or the hub.

python scripts/generate.py my-model "def main(" "import "
"""

import argparse

import torch

import zoo
from tasks import labels
from tasks.cli import run_script
from tasks.generation import check_sampling, generate, prompt_ids
from tasks.numbers import count
from zoo.data import open_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub repository, with its tokenizer")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--tokens", type=count, default=200, help="how many to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quantise", choices=["float8", "int8", "mxfp4"], help="keep experts in few bits")
    parser.add_argument(
        "--offload", type=count, metavar="N", help="memory for N experts a layer; all stay in their files"
    )
    parser.add_argument("--label", type=int, help="the domain, task or cluster of the text, where gates go by one")
    args = parser.parse_args()

    check_sampling(args.tokens, args.temperature)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {name: value for name in ("quantise", "offload") if (value := getattr(args, name)) is not None}
    model = zoo.from_pretrained(args.model, device=device, **options)
    tokenizer = open_tokenizer(args.model)
    told = {} if args.label is None else labels.told(model, {"source": torch.tensor(args.label)})
    torch.manual_seed(args.seed)  # now, for how a model is loaded draws numbers too
    for prompt in args.prompts:
        ids = prompt_ids(tokenizer, prompt)
        print(generate(model, tokenizer, ids, args.tokens, args.temperature, context=told))
        print()


if __name__ == "__main__":
    run_script(main)

"""What the experts of a language model do on texts: a page on specialisation, drops, early routing and relations.

python scripts/analyse_experts.py my-model one.txt two.py --out analysis.html
python scripts/analyse_experts.py my-model one.txt --earlier runs/step-100.ckpt runs/step-1000.ckpt

Every file is a domain of its own. --earlier are checkpoints of the same model, in the order of training.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import zoo
from tasks.cli import run_script
from tasks.numbers import count
from zoo.analysis import analyse
from zoo.data import open_tokenizer
from zoo.report.analysis import build_analysis

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub repository, with its tokenizer")
    parser.add_argument("texts", nargs="+", type=Path, help="text files")
    parser.add_argument("--out", type=Path, default=Path("analysis.html"), help="default %(default)s")
    parser.add_argument("--earlier", nargs="+", default=[], help="checkpoints of Lightning, or folders")
    parser.add_argument("--length", type=count, default=128, help="of a sequence; default %(default)s")
    parser.add_argument("--tokens", type=count, default=50_000, help="of each text at most; default %(default)s")
    args = parser.parse_args()
    try:
        page = analysis(args)
    except (OSError, ValueError, RuntimeError) as error:
        parser.exit(2, f"error: {str(error).partition(chr(10))[0]}\n")
    args.out.write_text(page, encoding="utf-8")
    print(f"written to {args.out}")


def analysis(args: argparse.Namespace) -> str:
    """The page; raises what is wrong with the arguments, as far as it shows before anything is computed."""
    for path in [*args.texts, *map(Path, args.earlier)]:
        if not path.exists():
            raise ValueError(f"there is no {path}")
    if args.out.exists():
        raise ValueError(f"--out: {args.out} exists; nothing was changed")
    if not args.out.parent.is_dir():
        raise ValueError(f"--out: there is no folder {args.out.parent}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = zoo.from_pretrained(args.model, device=device), open_tokenizer(args.model)
    batches = []
    for domain, path in enumerate(args.texts):
        [(ids, _)] = tokenizer.encode([path.read_text(encoding="utf-8", errors="replace")])
        whole = min(len(ids), args.tokens) // args.length
        if not whole:
            raise ValueError(
                f"{path} has {len(ids)} tokens, of which --tokens {args.tokens} at most are used: too few for one "
                f"sequence of --length {args.length}"
            )
        rows = torch.as_tensor(ids[: whole * args.length]).long().view(whole, args.length)
        batches += [(domain, part) for part in rows.split(BATCH)]
    keys: dict[str, Any] = {
        "token id": lambda batch: batch[1],
        "position": lambda batch: torch.arange(args.length).expand_as(batch[1]),
    }
    if len(args.texts) > 1:
        keys["domain"] = lambda batch: torch.full_like(batch[1], batch[0])

    def run(batch: tuple[int, torch.Tensor]) -> object:
        return model(input_ids=batch[1].to(device), use_cache=False)

    earlier = (weights(name) for name in args.earlier) if args.earlier else None
    try:
        document = analyse(model, batches, keys, args.length, run, earlier=earlier)
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        raise ValueError(f"--earlier: a checkpoint is of another model than {args.model}") from error
    return build_analysis(document, f"The experts of {args.model}")


def weights(name: str) -> dict[str, torch.Tensor]:
    """The weights of a model's folder, or of a checkpoint of Lightning; raises ValueError for anything else."""
    if Path(name).is_dir():
        return dict(zoo.from_pretrained(name).state_dict())
    try:
        state = torch.load(name, map_location="cpu", weights_only=True)["state_dict"]
        return {key.removeprefix("model."): value for key, value in state.items()}
    except Exception as error:  # another file may be read as anything
        raise ValueError(f"--earlier: {name} is no checkpoint of Lightning") from error


if __name__ == "__main__":
    run_script(main)

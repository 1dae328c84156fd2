"""What the experts of a language model do on texts: a page on specialisation, drops, early routing and relations.

python scripts/analyse_experts.py my-model one.txt two.py --out analysis.html
python scripts/analyse_experts.py my-model one.txt --earlier runs/step-100.ckpt runs/step-1000.ckpt

Every file is a domain of its own. --earlier are checkpoints of the same model, in the order of training.
"""

import argparse
from pathlib import Path

import torch

import zoo
from zoo.analysis import analyse, routing_over_training
from zoo.data import open_tokenizer
from zoo.report.analysis import analysis_page

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub repository, with its tokenizer")
    parser.add_argument("texts", nargs="+", type=Path, help="text files")
    parser.add_argument("--out", type=Path, default=Path("analysis.html"), help="default %(default)s")
    parser.add_argument("--earlier", nargs="+", default=[], help="checkpoints of Lightning, or folders")
    parser.add_argument("--length", type=int, default=128, help="of a sequence; default %(default)s")
    parser.add_argument("--tokens", type=int, default=50_000, help="of each text at most; default %(default)s")
    args = parser.parse_args()
    for path in args.texts:
        if not path.is_file():
            parser.error(f"there is no text {path}")
    if args.out.exists():
        parser.error(f"--out: {args.out} exists; nothing was changed")

    model, tokenizer = zoo.from_pretrained(args.model), open_tokenizer(args.model)
    batches = []
    for domain, path in enumerate(args.texts):
        [(ids, _)] = tokenizer.encode([path.read_text(encoding="utf-8", errors="replace")])
        whole = min(len(ids), args.tokens) // args.length
        if not whole:
            parser.error(f"{path} has {len(ids)} tokens, too few for one sequence of --length {args.length}")
        rows = torch.as_tensor(ids[: whole * args.length]).long().view(whole, args.length)
        batches += [(domain, part) for part in rows.split(BATCH)]
    keys = {
        "token id": lambda batch: batch[1],
        "position": lambda batch: torch.arange(args.length).expand_as(batch[1]),
    }
    if len(args.texts) > 1:
        keys["text"] = lambda batch: torch.full_like(batch[1], batch[0])

    def run(batch: tuple[int, torch.Tensor]) -> object:
        return model(input_ids=batch[1])

    try:
        document = analyse(model, batches, keys, args.length, run)
        if args.earlier:
            states = {name: weights(name) for name in args.earlier} | {"now": dict(model.state_dict())}
            found = routing_over_training(model, states, batches[:4], run)
            document["agreement"] = {layer: list(enumerate(each.values(), 1)) for layer, each in found.items()}
    except (ValueError, RuntimeError) as error:
        parser.error(f"{args.model}: {error}")
    args.out.write_text(analysis_page(document, f"The experts of {args.model}"), encoding="utf-8")
    print(f"written to {args.out}")


def weights(name: str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint of Lightning, or of a model's folder."""
    if Path(name).is_dir():
        return dict(zoo.from_pretrained(name).state_dict())
    state = torch.load(name, map_location="cpu", weights_only=True)["state_dict"]
    return {key.removeprefix("model."): value for key, value in state.items()}


if __name__ == "__main__":
    main()

"""Tune a frozen language model on two domains with a mixture of parameter-efficient experts, and with a single LoRA.

python scripts/adapt_language.py --kind MoLoRA
python scripts/adapt_language.py --kind MixLoRA --model my-model --domains my/code/ my/letters/ --out adapters

Domains are Python's own source and the language's reference by default. Without --model a tiny Llama of bytes is
trained first, on both, for --base-steps. Both tunings see the same batches, domain by domain in turn, at the same
learning rate; the LoRA stands beside all linear layers, of the rank that comes nearest in parameters. Gates that go by
a label hear which domain it is. Prints the loss in nats a token on text of each domain that nothing was trained on.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from tasks.cli import run_script
from tasks.folders import check_free
from tasks.numbers import count
from zoo.convert.adapter_kinds import KINDS, PARTS
from zoo.data.corpus import open_corpus
from zoo.moe import balance, record

LABELLED = {"MOELoRA": {"num_tasks": 2}, "MoCLE": {"num_clusters": 2}}
Draw = Callable[[int, str], Tensor]


def reference() -> str:
    """The language reference that the interpreter brings along, without its markup."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def texts(source: str | None, number: int) -> dict[str, str]:
    """Text to train on and text to judge by: files of a folder, Python's own source, or its reference."""
    if source is None and number:
        whole = reference()
        cut = len(whole) * 4 // 5
        return {"train": whole[:cut], "val": whole[cut:]}
    corpus = open_corpus(source or "stdlib")
    found = {}
    for split in ("train", "val"):
        parts, size = [], 0
        for document in corpus.documents(split):
            parts.append(document)
            size += len(document)
            if size > 2_000_000:
                break
        found[split] = "\n".join(parts)
    return found


def batches(text: dict[str, str], encode: Callable[[str], list[int]], length: int, size: int) -> Draw:
    """A function that cuts batch `number` of a split out of a domain's text, the same for the same number."""
    tokens = {split: torch.tensor(encode(part)) for split, part in text.items()}
    for split, found in tokens.items():
        if len(found) <= length:
            raise ValueError(f"expected more than {length} tokens of {split} text, got {len(found)}")

    def draw(number: int, split: str) -> Tensor:
        own = random.Random(number)
        starts = [own.randrange(len(tokens[split]) - length) for _ in range(size)]
        return torch.stack([tokens[split][start : start + length] for start in starts])

    return draw


def tiny() -> Any:
    """A Llama of bytes, untrained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=1024, **sizes))


def train(model: Any, draws: list[Draw], steps: int, lr: float, consistency: float = 0.0) -> Any:
    """AdamW on what is not frozen, domain by domain in turn, with what the gates add; returns the model."""
    from tasks.optim import parameter_groups

    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=lr)
    model.train()
    for step in range(steps):
        domain = step % len(draws)
        tokens = draws[domain](step, "train")
        with record(model) as recorded:
            out = run(model, tokens, domain)
            loss = out.loss + sum(recorded.losses().values())
            if consistency:  # AdaMix: another draw of adapters should say the same
                other = run(model, tokens, domain)
                loss = loss + other.loss + consistency * balance.consistency(out.logits, other.logits)
            loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def run(model: Any, tokens: Tensor, domain: int) -> Any:
    """The model on a batch, told its domain where it listens."""
    label = torch.full((len(tokens),), domain)
    near = nn.functional.one_hot(label, KINDS["MoR1E"].num_experts)  # to its own cluster alone
    told = {"moe_context": {"task": label, "cluster": label, "label": label, "sample_type": label, "intuition": near}}
    return model(tokens, labels=tokens, **(told if getattr(model, "adapted", None) else {}))


@torch.no_grad()
def judge(model: Any, draws: list[Draw], count: int = 8) -> list[float]:
    """Mean loss on each domain."""
    return [
        sum(float(run(model, draw(n, "val"), d).loss) for n in range(count)) / count for d, draw in enumerate(draws)
    ]


def trained(model: nn.Module) -> int:
    """How many parameters learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def one_lora(base: nn.Module, size: int) -> nn.Module:
    """The base with a LoRA beside every linear layer, its rank such that it has about `size` parameters."""
    each = trained(zoo.adapt(base, "LoRA", targets=PARTS, rank=1, share=True))
    rank = max(1, round(size / each))
    return zoo.adapt(base, "LoRA", targets=PARTS, rank=rank, alpha=2 * rank, share=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kind", default="MoLoRA", choices=[k for k, row in KINDS.items() if k != "LoRA" and not row.frozen]
    )
    parser.add_argument("--model", help="folder or hub repository of a language model, with its tokenizer")
    parser.add_argument("--domains", nargs=2, default=[None, None], help="files, folders or patterns, one a domain")
    parser.add_argument("--steps", type=count, default=300)
    parser.add_argument("--base-steps", type=count, default=300)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--length", type=count, default=128)
    parser.add_argument("--batch", type=count, default=16)
    parser.add_argument("--consistency", type=float, default=0.0, help="weight of AdaMix's loss between two passes")
    parser.add_argument("--out", help="folder for the adapters")
    args = parser.parse_args()

    if args.out:
        check_free("--out", args.out)
    torch.manual_seed(0)
    encode: Callable[[str], list[int]] = lambda text: list(text.encode())  # noqa: E731
    if args.model:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.model)
        encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    draws = [batches(texts(s, n), encode, args.length, args.batch) for n, s in enumerate(args.domains)]
    base = zoo.from_pretrained(args.model) if args.model else train(tiny(), draws, args.base_steps, 1e-3)

    options = {"router": LABELLED[args.kind]} if args.kind in LABELLED else {}
    mixture = zoo.adapt(base, args.kind, share=True, **options)
    single = one_lora(base, trained(mixture))
    found = {"frozen": (base, 0)}
    for name, model in (("one LoRA", single), (args.kind, mixture)):
        torch.manual_seed(1)
        found[name] = train(model, draws, args.steps, args.lr, args.consistency * (name == "AdaMix")), trained(model)
    print(f"{'':12} {'trained':>10} {'domain 1':>9} {'domain 2':>9}")
    for name, (model, size) in found.items():
        first, second = judge(model, draws)
        print(f"{name:12} {size:10,} {first:9.3f} {second:9.3f}")
    if args.out:
        zoo.save_pretrained(mixture, args.out)


if __name__ == "__main__":
    run_script(main)

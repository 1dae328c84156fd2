import csv
import math

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

import zoo
from tasks.language import LanguageTask
from zoo.data import Packed, flash_lengths
from zoo.data.tokens import Tokens

FAMILIES = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3"]
DOCUMENTS = ["def first(): pass", "x", "class Second: ...", "import third"]


def packed_batch(documents, length=24):
    ids, size, starts = [], [], []
    for text in documents:
        starts.append(len(ids))
        ids += [256, *text.encode(), 257]
        size += [-1, *[1] * len(text), -1]
    data = Packed(Tokens(*map(torch.tensor, (ids, size, starts))), length, pad=258, tail=True)
    rows = [data[i] for i in range(len(data))]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def documents_in(batch):
    """(row, from, to) of every stretch of one document in a packed batch, by the tokens that open one."""
    for row, ids in enumerate(batch["input_ids"].tolist()):
        padding = [ids.index(258)] if 258 in ids else []
        starts = sorted({0, *(i for i, token in enumerate(ids) if token == 256), *padding})
        for a, b in zip(starts, [*starts[1:], len(ids)]):
            yield row, a, b


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        *((f, "sdpa") for f in (*FAMILIES, "glm4_moe", "ernie4_5_moe")),
        *((f, "eager") for f in ("mixtral", "gpt_oss")),
        ("mixtral", "lengths"),
    ],
)
def test_a_documents_logits_do_not_depend_on_its_neighbours(family, attention, monkeypatch):
    torch.manual_seed(0)
    if attention == "lengths":
        register_attention_by_lengths()
    known = "sdpa" if attention == "lengths" else attention
    sizes = {"vocab_size": 259, "num_hidden_layers": 2}
    network = zoo.create_model(f"language/{family}_tiny", **sizes, attn_implementation=known).eval()
    if attention == "lengths":
        network.config._attn_implementation_internal = "flash_by_lengths"
    batch = packed_batch(DOCUMENTS)
    seen = []
    original = network.forward
    monkeypatch.setattr(network, "forward", lambda **k: seen.append(original(**k)) or seen[-1])
    task = LanguageTask(network)
    nats = task.nats(batch)
    logits = seen[0].logits
    checked = 0
    for row, a, b in documents_in(batch):
        alone = original(input_ids=batch["input_ids"][row : row + 1, a:b], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, a:b], alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))
        labels = batch["labels"][row, a:b]
        torch.testing.assert_close(
            nats[row, a:b], F.cross_entropy(alone, labels, reduction="none"), rtol=1e-3, atol=1e-4
        )
        checked += int((labels >= 0).sum())
    assert checked == sum(len(text) + 1 for text in DOCUMENTS)


def register_attention_by_lengths():
    """Attention as flash attention does it on packed batches: no mask, only where each document begins."""
    from transformers import AttentionInterface

    def attention(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **_):
        if cu_seq_lens_q is None:  # a document alone
            cu_seq_lens_q, max_length_q = torch.tensor([0, query.shape[2]]), query.shape[2]
        assert mask is None
        assert int(cu_seq_lens_q.diff().max()) == max_length_q
        groups = query.shape[1] // key.shape[1]
        flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
        flat[1:] = [t.repeat_interleave(groups, 1) for t in flat[1:]]
        out = torch.zeros_like(flat[0])
        for a, b in zip(cu_seq_lens_q.tolist(), cu_seq_lens_q.tolist()[1:]):
            q, k, v = (t[a:b].transpose(0, 1) for t in flat)
            out[a:b] = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(0, 1)
        return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None

    AttentionInterface.register("flash_by_lengths", attention)


def test_flash_lengths_count_every_document():
    lengths = flash_lengths(torch.tensor([[0, 1, 2, 0], [0, 1, 0, 0]]))
    assert lengths["cu_seq_lens_q"].tolist() == [0, 3, 4, 6, 7, 8]
    assert lengths["max_length_k"] == 3


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:290"])
def test_bits_per_byte_and_perplexity_are_those_of_each_document_alone(make, tokenizer):
    data = make.data(tokenizer=tokenizer, sequence_length=4096)
    task = make.task()
    [result] = make.trainer(limit_val_batches=1.0).validate(task, data, verbose=False)
    model = task.model.double().eval()
    text_nats = all_nats = tokens = size = 0.0
    for text in data.corpus.documents("val"):
        [(ids, _)] = data.tokenizer.encode([text])
        ids = torch.tensor([data.tokenizer.start, *ids.tolist(), data.tokenizer.end])
        log_probs = model(input_ids=ids[None, :-1], use_cache=False).logits[0].log_softmax(-1)
        nats = -log_probs.gather(-1, ids[1:, None])[:, 0]
        all_nats, tokens = all_nats + float(nats.sum()), tokens + len(nats)
        text_nats, size = text_nats + float(nats[:-1].sum()), size + len(text.encode())
    assert result["val/bits_per_byte"] == pytest.approx(text_nats / math.log(2) / size, rel=1e-4)
    assert result["val/loss"] == pytest.approx(all_nats / tokens, rel=1e-4)
    assert result["val/perplexity"] == pytest.approx(math.exp(all_nats / tokens), rel=1e-3)


class KeepGradients(pl.Callback):
    def __init__(self):
        self.kept = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.kept = {n: p.grad.clone() for n, p in pl_module.named_parameters()}


def gradients(make, batch_size, task=None, **trainer):
    pl.seed_everything(3, verbose=False)
    keep = KeepGradients()
    make.trainer(max_steps=1, callbacks=[keep], **trainer).fit(
        make.task(**(task or {})), make.data(batch_size=batch_size)
    )
    return keep.kept


def assert_close(a, b, rtol=1e-4):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=rtol * float(b[name].abs().max()), msg=name)


def test_accumulation_gives_the_gradient_of_the_whole_batch(make):
    assert_close(gradients(make, 2, accumulate_grad_batches=4), gradients(make, 8))


def test_recomputation_changes_nothing_and_counts_losses_once(make):
    noisy = {"router": make.noisy, "losses": {"switch": 1.0}, "overrides": {"attention_dropout": 0.1}}
    with_it = gradients(make, 4, {**noisy, "activation_checkpointing": True})
    assert_close(with_it, gradients(make, 4, noisy), rtol=1e-6)


def test_auxiliary_losses_are_added_once(make):
    arguments = {"router": {"class_path": "TopKRouter"}, "losses": {"switch": 1.0, "z": 0.5}}
    trained = gradients(make, 4, arguments)
    # The same by hand: the likelihood, and what every layer's router says, layer by layer.
    pl.seed_everything(3, verbose=False)
    task = make.task(vocab_size=259, **arguments)
    task.configure_model()
    batch = next(iter(make.data(batch_size=4).train_dataloader()))
    with zoo.moe.record(task.model) as step:
        logits = task.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum") / batch["labels"].numel()
    for routings in step.routings.values():
        [routing] = routings
        loss = loss + routing.losses["switch"] + routing.losses["z"]
    loss.backward()
    assert_close(trained, {n: p.grad for n, p in task.named_parameters()})


@pytest.mark.parametrize("accumulate", [1, 3])
def test_selection_biases_move_once_an_optimizer_step(make, accumulate):
    task = make.task(router={**make.noisy, "init_args": {"selection_bias": True, "bias_update_rate": 0.25}})
    make.trainer(max_steps=1, accumulate_grad_batches=accumulate).fit(task, make.data())
    for layer in task.model.model.layers:
        bias = layer.mlp.router.selection_bias
        assert set(bias.abs().tolist()) <= {0.0, 0.25}
        assert bias.abs().sum() > 0


def test_two_processes_train_and_evaluate_as_one_does(make, tmp_path):
    single = gradients(make, 8)
    pl.seed_everything(3, verbose=False)

    class Save(KeepGradients):
        def on_fit_end(self, trainer, pl_module):
            if trainer.is_global_zero:
                figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
                torch.save((self.kept, figures), tmp_path / "result.pt")

    limits = {"max_steps": 1, "limit_val_batches": 1.0, "val_check_interval": 1, "num_sanity_val_steps": 0}
    trainer = make.trainer(strategy="ddp_fork", devices=2, callbacks=[Save()], **limits)
    trainer.fit(make.task(lr=0.0), make.data(batch_size=4))
    double, figures = torch.load(tmp_path / "result.pt")
    assert_close(double, single)

    pl.seed_everything(3, verbose=False)
    alone = make.trainer(**limits)
    alone.fit(make.task(lr=0.0), make.data(batch_size=8))
    assert {"val/loss", "val/bits_per_byte", "val/perplexity", "val/load_max/layers.1.mlp"} <= figures.keys()
    # The padding that makes processes equally long counts nowhere, in loads neither.
    for name, value in figures.items():
        assert value == pytest.approx(float(alone.callback_metrics[name]), rel=1e-5, abs=1e-7), name


def test_what_fills_up_an_evaluation_takes_no_expert_from_real_tokens():
    """With few places an expert, rows of padding beside others, and the padding of the last one, change nothing."""
    torch.manual_seed(torch.seed() % 2**31)
    task = LanguageTask(
        zoo.create_model("language/mixtral_tiny", num_hidden_layers=2, vocab_size=260, capacity={"tokens": 6}).eval()
    )
    task.model = task.network
    batch = packed_batch(DOCUMENTS)
    rows, length = batch["labels"].shape
    real = int((batch["input_ids"] != 258).sum()) - 1  # the last token is foretold, and foretells nothing
    fill = {"input_ids": 258, "labels": -100, "target_bytes": -1}
    more = {
        name: torch.cat(
            [value, torch.full_like(value[:2], fill[name]) if name in fill else torch.arange(length).expand(2, -1)]
        )
        for name, value in batch.items()
    }
    seen = []
    with torch.no_grad():
        for each in (batch, more):
            with zoo.moe.record(task.model) as step:
                nats = task.nats(each)[:rows]
            decided = [calls[0] for calls in step.routings.values()]
            seen.append((nats, [d.counts.tolist() for d in decided], [int(d.asked.sum()) for d in decided]))
    torch.testing.assert_close(seen[1][0], seen[0][0], rtol=1e-5, atol=1e-6)
    assert seen[0][1:] == seen[1][1:]
    assert seen[0][2] == [2 * real] * 2
    assert max(max(counts) for counts in seen[0][1]) == 6


def test_logs_have_balance_layer_by_layer(make, tmp_path):
    from tasks.lightning_cli import loggers

    logs = loggers(tmp_path, "language")
    trainer = make.trainer(max_steps=3, logger=logs, limit_val_batches=1)
    trainer.fit(make.task(losses={"switch": 0.1}), make.data())
    folder = tmp_path / "language" / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(folder.glob("events.out.tfevents.*"))
    for layer in ("layers.0.mlp", "layers.1.mlp"):
        for figure in ("load_max", "entropy", "drop_rate"):
            values = [float(r[f"train/{figure}/{layer}"]) for r in rows if r.get(f"train/{figure}/{layer}")]
            assert len(values) == 3
            assert all(math.isfinite(v) for v in values)
        assert all(1 <= float(r[f"train/load_max/{layer}"]) <= 4 for r in rows if r.get(f"train/load_max/{layer}"))
    assert {"train/loss", "train/loss_switch", "train/tokens_per_s"} <= rows[0].keys()
    bar = trainer.progress_bar_metrics
    assert {"loss", "tokens/s", "balance"} <= bar.keys()


def test_the_logged_loss_is_that_of_all_micro_batches_of_a_step(make):
    """Against float64 log-probabilities; targets of the last micro-batch alone would give another mean."""
    seen = []

    class Look(pl.Callback):
        def __init__(self):
            self.rows = []

        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            self.rows.append(batch)

        def on_before_optimizer_step(self, trainer, task, optimizer):
            total = number = 0
            for batch in self.rows:
                inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
                with torch.no_grad():
                    logits = task.model(**inputs, use_cache=False).logits.double()
                told = batch["labels"] >= 0
                total += -logits.log_softmax(-1)[told].gather(1, batch["labels"][told][:, None]).sum()
                number += int(told.sum())
            seen.append((float(trainer.callback_metrics["train/loss"]), float(total / number)))
            self.rows = []

    trainer = make.trainer(max_steps=5, accumulate_grad_batches=3, callbacks=[Look()])
    trainer.fit(make.task(), make.data(batch_size=13))  # seven batches an epoch: the third step is short
    assert len(seen) == 5
    for logged, expected in seen:
        assert logged == pytest.approx(expected, rel=1e-6)


def test_what_was_exported_generates_the_same_in_transformers(make, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = ["while router ", "expert"]
    settings = {"temperature": 0.0, "max_new_tokens": 12, "overrides": {"num_experts_per_tok": 2}}
    task = make.task(export=str(tmp_path / "out"), **settings)
    data = make.data(prompts=prompts)
    trainer = make.trainer(max_steps=2)
    trainer.fit(task, data)
    ours = trainer.predict(task, data)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for prompt, text in zip(prompts, ours):
        assert text.startswith(prompt)
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert tokenizer.decode(out[0], skip_special_tokens=True) == text
    again = make.task(export=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="exists and is not empty"):
        make.trainer(max_steps=2).fit(again, make.data())
    make.trainer(max_steps=2).validate(again, make.data(), verbose=False)  # which exports nothing


def test_training_goes_on_from_a_pretrained_folder(make, tmp_path):
    pretrained = zoo.create_model("language/mixtral_tiny", vocab_size=259, **make.tiny).eval()
    zoo.save_pretrained(pretrained, tmp_path / "model")
    task = LanguageTask(pretrained=str(tmp_path / "model"), losses={"switch": 0.5}, lr=0.0, weight_decay=0.0)
    trainer = make.trainer(max_steps=1)
    trainer.fit(task, make.data())
    assert trainer.logged_metrics["train/loss_switch"] > 0.5
    ids = torch.randint(256, (1, 20))
    torch.testing.assert_close(task.model.eval()(input_ids=ids).logits, pretrained(input_ids=ids).logits)


def test_a_pretrained_folder_goes_on_with_another_gate(make, tmp_path):
    zoo.save_pretrained(zoo.create_model("language/mixtral_tiny", vocab_size=259, **make.tiny), tmp_path / "model")
    task = LanguageTask(pretrained=str(tmp_path / "model"), router=make.noisy, lr=0.0, weight_decay=0.0)
    trainer = make.trainer(max_steps=1)
    trainer.fit(task, make.data())
    assert all(layer.mlp.router.jitter == 0.1 for layer in task.model.model.layers)


def test_a_checkpoint_is_a_model_again_without_trainer_or_data(make, tmp_path):
    task = make.task(losses={"switch": 0.1})
    trainer = make.trainer(max_steps=1)
    trainer.fit(task, make.data())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = LanguageTask.load_from_checkpoint(tmp_path / "model.ckpt")
    batch = packed_batch(DOCUMENTS)
    assert torch.equal(again.eval().nats(batch), task.eval().nats(batch))


def test_a_vocabulary_smaller_than_the_tokenizers_is_an_error(make):
    with pytest.raises(ValueError, match="259 tokens, but the model's vocabulary only 100"):
        make.trainer(max_steps=1).fit(make.task(vocab_size=100), make.data())


def test_a_compiled_model_gives_the_same_gradients_and_losses(make, monkeypatch):
    # Traced, but not translated to machine code, which takes minutes.
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: whole(self, backend="aot_eager", fullgraph=True))
    task = {"router": {"class_path": "TopKRouter"}, "losses": {"switch": 1.0}}
    assert_close(gradients(make, 4, {**task, "compile": True}), gradients(make, 4, task))


def test_preparing_data_leaves_nothing_to_tokenize(make, monkeypatch):
    data = make.data(tokenizer="bpe:280")
    data.prepare_data()
    monkeypatch.setattr("zoo.data.tokens._write", lambda *_: 1 / 0)
    monkeypatch.setattr("zoo.data.tokenizer._train_bpe", lambda *_: 1 / 0)
    again = make.data(tokenizer="bpe:280")
    assert len(again.train_dataloader()) > 0
    assert len(again.val_dataloader()) > 0

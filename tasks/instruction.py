"""Instruction tuning: vision-language models trained on the answers of conversations about images.

python -m tasks.vision_language fit --config configs/vision_language/moe_llava_digits_1.yaml
"""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from tasks import frozen, labels
from tasks.answering import answer, open_image
from tasks.modalities import ModalityShares, keep_shares, log_shares
from tasks.predictions import check_predictions, write_predictions
from tasks.training import Overrides, Task
from zoo.convert.upcycling import language_model
from zoo.data.packing import IGNORE, flash_lengths
from zoo.models import moe_llava
from zoo.parallel.parts import is_spread
from zoo.pretrained import llava
from zoo.pretrained.generating import KEY, hears

BESIDE = ("labels", "answers", "real", "source")  # what a batch holds besides the model's inputs


class InstructionTask(Task):
    """Instruction tuning of a model from images and text to text; only answers are trained.

    Args:
        network: the name of a model of ours ("vision_language/moe_llava_tiny", see `zoo models`), or a module.
        pretrained: a folder or hub repository to start from instead, or those of the parts of a LLaVA that a fresh
            projector joins: {"language_model": ..., "vision_tower": ...} (`zoo.pretrained.llava.join`).
        overrides: fields of the model's configuration to change, or keywords of `zoo.from_pretrained`;
            {"moe": false} makes the dense twin of a MoE-LLaVA.
        router: the gate of every MoE layer, {"class_path": ..., "init_args": {...}}; the family's own by default.
        losses: auxiliary losses by name with their weights; the family's own by default.
        capacity: places an expert, a factor or the arguments of `zoo.moe.Capacity`.
        sparse: give a dense model experts, copies of its MLPs: options of `zoo.models.moe_llava.sparse`, {} for
            MoE-LLaVA's own.
        stage: which parameters to train, as in MoE-LLaVA's stage 1 (the projector), 2 (all but the vision tower) or 3
            (MLPs and gates); all by default.
        max_new_tokens: length of what `predict` answers.
        predictions: the file that `predict` writes: path, question and answer. Of an image that turns out damaged when
            it is decoded a warning tells, and its answers are empty.
        training: arguments of `tasks.training.Task`: learning rate, schedule and so on.
    """

    unit = "tokens"
    generates = True

    def __init__(
        self,
        network: str | nn.Module = "vision_language/moe_llava_tiny",
        pretrained: str | dict[str, str] | None = None,
        overrides: Overrides | None = None,
        router: dict[str, Any] | str | None = None,
        losses: dict[str, Any] | None = None,
        capacity: float | dict[str, Any] | None = None,
        sparse: dict[str, Any] | None = None,
        stage: Literal[1, 2, 3] | None = None,
        max_new_tokens: int = 32,
        predictions: str = "answers.csv",
        **training: Any,
    ) -> None:
        super().__init__(network, **training)
        self.overrides: dict[str, Any] = dict(overrides or {})
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self._subcommand = "fit"
        self._shares = ModalityShares()
        self._number_since_update: Tensor | None = None  # by this name `ExactResume` keeps it
        if isinstance(pretrained, dict) and set(pretrained) != {"language_model", "vision_tower"}:
            raise ValueError(
                f"pretrained: expected a folder, or language_model and vision_tower, got {', '.join(pretrained)}"
            )
        if stage is not None and any(name == "adapt" for name, _ in self._conversions):
            raise ValueError(
                "stage and convert's adapt both say what is trained; leave out stage, and let adapt unfreeze the rest"
            )
        if sparse is None and pretrained is None and stage == 3 and self.overrides.get("moe") is False:
            raise ValueError("stage 3 trains experts: give sparse, or a pretrained model that has them")

    def build(self) -> nn.Module:
        """The model that the arguments describe, fresh or pretrained, with the gradients of its stage."""
        h = self.hparams
        given = {name: h[name] for name in ("router", "losses", "capacity") if h[name] is not None}
        upcycled = given if h["sparse"] is not None else {}
        own = {**self.overrides, **({} if upcycled else given)}
        # The trainer's precision decides, not the checkpoint's: bfloat16 weights hardly move under AdamW.
        kind = {"dtype": torch.get_default_dtype()}
        if isinstance(h["pretrained"], dict):
            model: Any = llava.join(**{**h["pretrained"], **kind, **own})
        elif h["pretrained"]:
            model = zoo.from_pretrained(h["pretrained"], **{**kind, **own})
        else:
            assert isinstance(self.network, str)
            model = zoo.create_model(self.network, **own)
        if not hasattr(model, "generate") or getattr(model.config, "vision_config", None) is None:
            raise ValueError(f"{type(model).__name__} is no model from images to text")
        if h["sparse"] is not None:
            model = moe_llava.sparse(model, **{**upcycled, **h["sparse"]})
        return model if h["stage"] is None else moe_llava.stage(model, h["stage"])

    def frozen_in_files(self) -> bool:
        """Whether a model is read whole, and nothing of it is made anew but what learns, such as experts in stage 3."""
        h = self.hparams
        made = isinstance(h["pretrained"], dict) or (h["sparse"] is not None and h["stage"] != 3)
        return not made and frozen.in_files(h, self._conversions)

    def check_run(self, trainer: Any, data: Any, subcommand: str, checkpoint: str | None) -> None:
        """Raise ValueError for what is wrong with a run of the command line, before any work is done."""
        self._subcommand = subcommand
        super().check_run(trainer, data, subcommand, checkpoint)

    def check(self, data: Any) -> None:
        """Build the model without memory: raises what is wrong with the arguments before any work is done."""
        check_predictions(self.hparams["predictions"], bool(data.show))
        super().check(data)

    def checked_on_meta(self) -> bool:
        """Whether `build` needs no memory on the meta device; parts that are to be joined are read first."""
        return not isinstance(self.hparams["pretrained"], dict)

    def check_model(self, model: Any, data: Any) -> None:
        """Raise ValueError for what of the data does not fit the model: vocabulary, images, length."""
        trainer = self._trainer
        running = trainer.state.fn if trainer else None
        subcommand = self._subcommand if running is None else running.value
        data.fit_to(model, {"fit": "train", "validate": "val", "test": "test"}.get(subcommand))
        if subcommand == "predict":
            data.check_asked(model, self.hparams["max_new_tokens"])

    def configure_model(self) -> None:
        """Build the model, and let the data fit its processor to it; Lightning calls this."""
        if self.waits_for_checkpoint():
            return
        data = getattr(self._trainer, "datamodule", None)
        built: Any = self.build() if self.model is None else None
        model = self.model if built is None else built
        if data is not None:
            self.check_model(model, data)
            model.config.image_token_id = data.chat.image_id
            _stop_at(model.generation_config, data.chat.end)
        self.model = model if built is None else self.converted(built)
        self.prepare_model(self.recompute_layers)

    def count(self, batch: dict[str, Tensor]) -> int:
        """Tokens in a batch, those of images and padding among them."""
        return batch["input_ids"].numel()

    def logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [N, V] float32 before each of the N tokens of answers, and these tokens [N].

        Raises RuntimeError for a model in parts where some processes' batches have images and others have none.
        """
        if is_spread(self.model):
            shown = torch.tensor(float(any(n.startswith("pixel_values") for n in batch)), device=self.device)
            if 0 < self.trainer.strategy.reduce(shown, reduce_op="mean") < 1:
                raise RuntimeError(
                    f"step {self.global_step + 1}: the batches of some processes have images and those of others none, "
                    "but a model in parts needs all of them for its vision tower; take a larger data.batch_size, leave "
                    "out conversations without images, or use trainer.strategy ddp_find_unused_parameters_true"
                )
        inputs = {name: value for name, value in batch.items() if name not in BESIDE}
        # Gates are told what is padding: packed rows have no attention mask, and rows that fill a batch up attend.
        if hears(self.model):
            inputs[KEY] = {"mask": batch["real"].bool(), **labels.told(self.model, batch).get(KEY, {})}  # type: ignore[assignment]
        if "attention_mask" not in batch and "flash" in str(self.model.config._attn_implementation):
            inputs |= flash_lengths(batch["position_ids"])
        # A token is foretold at the place before it. Places before no answer in any row do not pass the head.
        after = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            columns = (after != IGNORE).any(0).nonzero().flatten()
            inputs["logits_to_keep"] = columns
            after = after[:, columns]
        logits = self.model(**inputs, use_cache=False).logits
        wanted = after != IGNORE
        return logits[wanted].float(), after[wanted]

    def batch_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean negative log-likelihood of the answers' tokens."""
        return F.cross_entropy(*self.logits(batch))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of the answers' tokens, plus auxiliary losses.

        Every answer token weighs the same, whichever process and micro-batch it is in.
        """
        with zoo.moe.record(self.model) as step:
            logits, targets = self.logits(batch)
        nats = F.cross_entropy(logits, targets, reduction="sum")
        number = torch.tensor(float(len(targets)), device=nats.device)
        self.log_loss(nats, number, batch_idx)
        # Gradients are averaged over processes.
        number = self.trainer.strategy.reduce(number, reduce_op="mean").clamp(min=1)
        return self.with_auxiliary(nats / number, step) * self._share(number, batch_idx)

    def _share(self, number: Tensor, batch_idx: int) -> Tensor | float:
        """The weight of a micro-batch of so many tokens; gradients of those before it in the step shrink to match.

        Lightning takes the mean over as many micro-batches as a step has, whatever is in them.
        """
        if (window := self.trainer.accumulate_grad_batches) == 1:
            return 1.0
        before = self._number_since_update if batch_idx % window else None
        total = number if before is None else before + number
        self._number_since_update = total
        if before is not None:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(before / total)
        return window * number / total

    def on_validation_epoch_start(self) -> None:
        """Start anew."""
        super().on_validation_epoch_start()
        self._shares = ModalityShares()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add to the sums of an evaluation."""
        with zoo.moe.record(self.model) as step:
            logits, targets = self.logits(batch)
        # Every layer of the language model is called once; an image's tokens are modality 0, all others 1.
        modality = (batch["input_ids"] != self.model.config.image_token_id).long().flatten()
        self._shares.update(step, [modality], within=language_model(self.model))
        wrong = logits.argmax(-1) != targets
        # An answer's number in the batch: a row has fewer answers than tokens.
        rows, length = batch["answers"].shape
        numbers = batch["answers"] + torch.arange(rows, device=targets.device)[:, None] * (length + 1)
        numbers = numbers[:, 1:][batch["labels"][:, 1:] != IGNORE]
        answers, place = numbers.unique(return_inverse=True)
        missed = torch.zeros(len(answers), dtype=torch.long, device=targets.device).index_add(0, place, wrong.long())
        nats = F.cross_entropy(logits.double(), targets, reduction="none")
        row, row_of_answer = numbers // (length + 1), answers // (length + 1)
        source = batch.get("source", torch.zeros(rows, dtype=torch.int64, device=targets.device))
        sums = nats.new_zeros(max(len(self._sources()), 1), 5)
        per_token = torch.stack([nats, torch.ones_like(nats), wrong.to(nats)], dim=1)
        sums[:, :3].index_add_(0, source[row], per_token)
        per_answer = torch.stack([torch.ones_like(missed), missed == 0], dim=1).to(nats)
        sums[:, 3:].index_add_(0, source[row_of_answer], per_answer)
        self.add_to_evaluation(step, sums.flatten())

    test_step = validation_step

    def evaluated(self, sums: list[float]) -> tuple[dict[str, float], str]:
        """Loss and perplexity a token, tokens foretold, and answers of which every token is the likeliest.

        With a dropless gate those are the answers that greedy generation gives. Where sources have names, of each of
        them too.
        """
        rows = [sums[at : at + 5] for at in range(0, len(sums), 5)]
        figures = _figures([sum(column) for column in zip(*rows)])
        for name, row in zip(self._sources(), rows):
            figures |= {f"{figure}/{name}": value for figure, value in _figures(row).items()}
        return figures, "answers_right"

    def _sources(self) -> list[str]:
        return getattr(getattr(self._trainer, "datamodule", None), "names", [])

    def modality_shares(self) -> dict[str, Any]:
        """Which experts the images and texts of the latest evaluation went to, by layer and modality."""
        return self._shares.compute()

    def _log_evaluation(self, stage: str) -> None:
        super()._log_evaluation(stage)
        shares = self.modality_shares()
        log_shares(self, stage, shares)
        if stage == "val":
            keep_shares(self, shares)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Path, question and the model's answer."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        processor = data.chat.processor
        question, found = batch["question"], ""
        try:
            images = [open_image(batch["path"])]
        except (OSError, ValueError) as error:  # beyond the head, which was read before any work
            warnings.warn(f"{error}: question {question!r} is not answered", stacklevel=2)
        else:
            told = labels.told(self.model, batch)
            found = answer(self.model, processor, images, question, self.hparams["max_new_tokens"], data.system, told)
        return [{"path": batch["path"], "question": question, "answer": found}]

    def show_predictions(self, predictions: list[Any]) -> None:
        """Write the file of answers, those of all processes."""
        write_predictions(self.hparams["predictions"], self.trainer, predictions)

    def on_fit_end(self) -> None:
        """Export model and processor, where asked for."""
        super().on_fit_end()
        if self.hparams["export"] and self.trainer.is_global_zero:
            processor = self.trainer.datamodule.chat.processor  # type: ignore[attr-defined]
            processor.save_pretrained(self.hparams["export"])


def _figures(sums: list[float]) -> dict[str, float]:
    nats, tokens, wrong, answers, right = sums
    loss = nats / max(tokens, 1)
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": 1 - wrong / max(tokens, 1)}
    return {**figures, "answers_right": right / max(answers, 1)}


def _stop_at(config: Any, token: int | None) -> None:
    """Let generation end where answers do, besides where it did."""
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if token is not None and token not in known:
        found = [*(t for t in known if t is not None), token]
        config.eos_token_id = found if len(found) > 1 else token

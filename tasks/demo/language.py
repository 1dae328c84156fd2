"""The language part of the demo: a small MoE and its dense twin, on the source of Python's standard library.

Both train through the task's own command line classes, as `zoo language fit --config FILE` does, on the same batches
in the same order. They train side by side, each in a process and on cores of its own, for the same time; so the faster
one takes more steps. The learning rate stays constant after warm-up and the weights that are evaluated are a running
average: any moment of either run is then a fair result, with no decay planned for some later end, and the two can be
compared both at equal steps and at equal time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from .machine import cores_each, fast_precision, in_words
from .output import tell, write_json
from .side_by_side import side_by_side

# Name in files, and for people; the first one prepares the data.
MODELS = {"moe": "mixture of experts", "dense": "dense twin"}
ANALYSED = 8  # batches
CONFIG_SECONDS = 160.0  # the length of run that the configuration's val_check_interval is meant for


def run(folder: Path, config: Path, seconds: float) -> bool:
    """Train both models for `seconds` and leave data, checkpoints and text; False when Ctrl-C cut it short.

    Raises ValueError for a configuration that does not fit.
    """
    print("loading libraries", flush=True)
    try:
        return side_by_side(list(MODELS), _prepare, _train, folder, config, seconds)
    finally:
        _gather(folder)


def _prepare(folder: Path, config: Path, seconds: float) -> str:
    """Put the data into the cache; the answer is the precision to train in."""
    precision = fast_precision()
    data = _build("moe", folder, config, precision).datamodule
    print(f"text: {data.corpus.description}; tokenizer {data.tokenizer_name}", flush=True)
    data.prepare_data()
    each = in_words(cores_each(len(MODELS)))
    print(f"training side by side for {seconds:.0f} s, {each}; Ctrl-C stops and reports", flush=True)
    return precision


def _train(
    name: str,
    precision: str,
    start: Callable[[], None],
    stopping: Callable[[], bool],
    folder: Path,
    config: Path,
    seconds: float,
) -> None:
    """Train one of the models, and leave what the report says about it."""
    import torch

    from .recorder import Recorder

    own = folder / name
    own.mkdir(parents=True, exist_ok=True)
    cli = _build(name, own, config, precision)
    trainer = cli.trainer
    if isinstance(trainer.val_check_interval, int):
        trainer.val_check_interval = max(1, round(trainer.val_check_interval * seconds / CONFIG_SECONDS))
    recorder = Recorder(name, own, start, stopping, seconds)
    trainer.callbacks.insert(0, recorder)
    torch.manual_seed(0)
    trainer.fit(cli.model, cli.datamodule)
    _wrap_up(name, cli, own, precision)


def _build(name: str, folder: Path, config: Path, precision: str) -> Any:
    """What `zoo language fit` makes of the configuration: its model, datamodule and trainer, not yet run."""
    from tasks.language import LanguageData, LanguageTask

    from .entrants import entrant

    options = {
        "model.overrides.dense": str(name == "dense").lower(),
        "trainer.precision": precision,
        "trainer.default_root_dir": str(folder),
    }
    return entrant("language", LanguageTask, LanguageData, config, options)


def _wrap_up(name: str, cli: Any, folder: Path, precision: str) -> None:
    """What the report says about a model; of the mixture of experts also text, its experts, and an export."""
    import zoo
    from zoo.models import count_parameters

    from .experts import specialisation, token_names

    task, data = cli.model, cli.datamodule
    if task.model is None:  # stopped before its first step
        return
    total, active = count_parameters(task.model)
    about = {
        "label": MODELS[name],
        "total": total,
        "active": active,
        "batch": [data.batch_size, data.sequence_length],
        "config": task.model.config.to_diff_dict(),
    }
    common = {"precision": precision, "corpus": data.corpus.description, "tokenizer": data.tokenizer_name}
    write_json(folder / "about.json", {"model": about, "common": common})
    if name != "moe":
        return
    task.model.eval()
    print("looking at what each expert does, and writing text", flush=True)
    batches = _evaluation_batches(cli)
    write_json(folder / "specialisation.json", specialisation(task, batches, token_names(data.tokenizer)))
    write_json(folder / "analysis.json", _analysis(task, batches[:ANALYSED], folder))
    write_json(folder / "samples.json", _samples(task, data))
    try:
        zoo.save_pretrained(task.model, folder / "model")
        data.tokenizer.save_pretrained(folder / "model")
    except ValueError as reason:  # gates that no published layout can express
        tell(f"the model is in {folder / 'last.ckpt'} alone: {reason}")


def _analysis(task: Any, batches: list[Any], folder: Path) -> dict[str, Any]:
    """What the experts do, and how early the gates chose as they do now."""
    import torch

    from zoo.analysis import analyse

    from .recorder import layer_number

    keys = {
        "token id": lambda batch: batch["input_ids"],
        "position": lambda batch: torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]),
    }
    found = analyse(task.model, batches, keys, batches[0]["input_ids"].shape[1], task.nats)
    layers = {f"layer {layer_number(name)}": figures for name, figures in found["layers"].items()}
    path = folder / "agreement.json"
    return {"layers": layers, "agreement": json.loads(path.read_text()) if path.exists() else {}}


def _gather(folder: Path) -> None:
    """Put together what the two said about themselves."""
    about: dict[str, Any] = {"models": {}}
    for name in MODELS:
        path = folder / name / "about.json"
        if path.exists():
            said = json.loads(path.read_text())
            about["models"][name] = said["model"]
            about.update(said["common"])
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "about.json", about)


def _evaluation_batches(cli: Any) -> list[Any]:
    limit = cli.trainer.limit_val_batches
    return list(islice(cli.datamodule.val_dataloader(), limit if isinstance(limit, int) else None))


def _samples(task: Any, data: Any) -> list[dict[str, str]]:
    """Text that continues each of the configuration's prompts."""
    import torch

    from tasks.generation import generate, prompt_ids

    torch.manual_seed(0)
    h, samples = task.hparams, []
    for prompt in data.prompts:
        ids = prompt_ids(data.tokenizer, prompt)
        text = generate(task.model, data.tokenizer, ids, h["max_new_tokens"], h["temperature"], h["top_p"])
        samples.append({"prompt": prompt, "text": text})
    return samples

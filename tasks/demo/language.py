"""The language part of the demo: a small MoE and its dense twin, on the source of Python's standard library.

Both train through the task's own command line classes, as `zoo language fit --config FILE` does, on the same batches
in the same order. They train by turns in one process, each with a clock of its own that counts training alone, and
for the same time; so the faster one takes more steps. The learning rate stays constant after warm-up and the weights
that are evaluated are a running average: any moment of either run is then a fair result, with no decay planned for
some later end, and the two can be compared both at equal steps and at equal time.
"""

from __future__ import annotations

import json
import logging
import warnings
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from .machine import cores, fast_precision, keep_freed_memory
from .turns import Turns, take_turns

# Name in files, and for people; the first one starts.
MODELS = {"moe": "mixture of experts", "dense": "dense twin"}
CONFIG_SECONDS = 160.0  # the length of run that the configuration's val_check_interval is meant for
SLICE_SECONDS = 2.0  # of a turn


def run(folder: Path, config: Path, seconds: float) -> bool:
    """Train both models for `seconds` in all and leave data, checkpoints and text; False when Ctrl-C cut it short.

    Raises ValueError for a configuration that does not fit.
    """
    keep_freed_memory()
    print("loading libraries", flush=True)
    import lightning.pytorch  # noqa: F401  it sets levels of its own

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # advice on loaders, loggers and speed
    precision = fast_precision()
    entrants = {name: _build(name, folder / name, config, precision) for name in MODELS}
    data = entrants["moe"].datamodule
    print(f"text: {data.corpus.description}; tokenizer {data.tokenizer_name}", flush=True)
    data.prepare_data()
    finished = _race(entrants, folder, seconds / len(entrants))
    _wrap_up(entrants, folder, precision)
    return finished


def _build(name: str, folder: Path, config: Path, precision: str) -> Any:
    """What `zoo language fit` makes of the configuration: its model, datamodule and trainer, not yet run."""
    from tasks.language import LanguageData, LanguageTask
    from tasks.lightning_cli import ArgumentMistake, TaskCLI

    class Prepared(TaskCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            """Left to the race."""

    options = {
        "model.overrides.dense": str(name == "dense").lower(),
        "trainer.precision": precision,
        "trainer.max_steps": "-1",
        "trainer.default_root_dir": str(folder),
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.enable_checkpointing": "false",
        "trainer.num_sanity_val_steps": "0",
    }
    arguments = ["fit", "--config", str(config), *(f"--{key}={value}" for key, value in options.items())]
    try:
        return Prepared("language", "fit", LanguageTask, LanguageData, arguments)
    except ArgumentMistake as mistake:
        raise ValueError(f"{config}: {mistake}") from mistake


def _race(entrants: dict[str, Any], folder: Path, seconds: float) -> bool:
    """Train all for `seconds` each, by turns."""
    import torch

    from .recorder import Recorder

    turns = Turns(list(entrants), SLICE_SECONDS)

    def runner(name: str) -> None:
        cli = entrants[name]
        trainer = cli.trainer
        if isinstance(trainer.val_check_interval, int):
            share = seconds * len(entrants) / CONFIG_SECONDS
            trainer.val_check_interval = max(1, round(trainer.val_check_interval * share))
        (folder / name).mkdir(parents=True, exist_ok=True)
        trainer.callbacks.insert(0, Recorder(name, folder / name, turns, seconds, lambda line: print(line, flush=True)))
        torch.manual_seed(0)
        trainer.fit(cli.model, cli.datamodule)

    print(f"training by turns, {seconds:.0f} s each on {cores()} cores; Ctrl-C stops and reports", flush=True)
    return take_turns(turns, {name: partial(runner, name) for name in entrants})


def _wrap_up(entrants: dict[str, Any], folder: Path, precision: str) -> None:
    """Export the models, and write what the report says about them."""
    import zoo
    from zoo.models import count_parameters

    from .experts import specialisation, token_names

    about: dict[str, Any] = {"precision": precision, "models": {}}
    for name, cli in entrants.items():
        task, data = cli.model, cli.datamodule
        if task.model is None:  # stopped before its first step
            continue
        total, active = count_parameters(task.model)
        about["corpus"], about["tokenizer"] = data.corpus.description, data.tokenizer_name
        about["models"][name] = {
            "label": MODELS[name],
            "total": total,
            "active": active,
            "batch": [data.batch_size, data.sequence_length],
            "config": task.model.config.to_diff_dict(),
        }
        task.model.eval()
        if name == "moe":
            print("looking at what each expert does, and writing text", flush=True)
            found = specialisation(task, _evaluation_batches(cli), token_names(data.tokenizer))
            _write(folder / name / "specialisation.json", found)
            _write(folder / name / "samples.json", _samples(task, data))
            zoo.save_pretrained(task.model, folder / name / "model")
            data.tokenizer.save_pretrained(folder / name / "model")
    _write(folder / "about.json", about)


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


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")

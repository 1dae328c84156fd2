"""The command line of every task: `zoo <domain> fit|validate|test|predict --config FILE`.

What needs no library is done first: help, misspelt subcommands, config files that do not exist.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from zoo import extras
from zoo.nearest import unknown

# domain: (its classes, in the module of the same name; what it is)
DOMAINS = {
    "language": ("LanguageTask", "LanguageData", "causal language models"),
    "recommendation": ("RecommendationTask", "RecommendationData", "multi-task recommendation models"),
    "vision": ("VisionTask", "VisionData", "image classifiers"),
    "vision_language": ("ContrastiveTask", "VisionLanguageData", "models of images and text"),
}

# Domains with more than one task: the classes by the name that `task` in a config gives, and what each is; the first is
# that of a config that names none.
TASKS = {
    "vision_language": {
        "contrastive": ("ContrastiveTask", "VisionLanguageData", "one space for images and text, as LIMoE's"),
        "instruction": ("InstructionTask", "InstructionData", "answers about images, as MoE-LLaVA's"),
    }
}

SUBCOMMANDS = {
    "fit": "train, and validate along the way",
    "validate": "evaluate on the validation split",
    "test": "evaluate on the test split",
    "predict": "generate text, classify images, score rows",
}


CONFIGS = Path(__file__).parent / "configs"


def main(domain: str, argv: Sequence[str] | None = None) -> int:
    """Run a task's command line; returns the exit status, 2 for a mistake in the arguments."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage(domain))
        return 0
    try:
        if args[0] not in SUBCOMMANDS:
            raise unknown(f"subcommand of zoo {domain}", args[0], SUBCOMMANDS)
        configs = [checked_config(path) for path in _config_files(args)]
        args = _with_ours(args)
        task, data, _ = _classes(domain, args, configs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    from tasks.lightning_cli import run

    module = import_module(f"tasks.{domain}")
    return run(domain, getattr(module, task), getattr(module, data), args)


def _classes(domain: str, args: Sequence[str], configs: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    """The row of DOMAINS, or of TASKS for the task that the options or the last config with one name."""
    if domain not in TASKS:
        return DOMAINS[domain]
    named = [config["task"] for config in configs if "task" in config] + _values(args, "--task")
    name = str(named[-1]) if named else next(iter(TASKS[domain]))
    if name not in TASKS[domain]:
        raise unknown(f"task of zoo {domain}", name, TASKS[domain])
    return TASKS[domain][name]


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; what is wrong with its arguments and files is one line, with exit status 2."""
    try:
        with extras.named():
            main()
    except (ValueError, OSError, ImportError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        ours = frame.f_globals.get("__name__", "").partition(".")[0] in ("zoo", "tasks", "__main__")
        if isinstance(error, ValueError) and not ours:
            raise  # nobody meant it for a user
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def usage(domain: str) -> str:
    """Help for a task, without its options."""
    lines = [f"  {name:<10}{text}" for name, text in SUBCOMMANDS.items()]
    if domain in TASKS:
        lines += ["", "tasks, --task NAME or task: NAME in a config; the first by default:"]
        lines += [f"  {name:<13}{text}" for name, (_, _, text) in TASKS[domain].items()]
    return "\n".join(
        [
            f"usage: zoo {domain} SUBCOMMAND --config FILE [--KEY VALUE ...]",
            "",
            f"{DOMAINS[domain][2]}; subcommands:",
            *lines,
            "",
            f"Configurations are in configs/{domain}. Every key of one is an option too: --model.lr 3e-4,",
            "--trainer.max_steps 1000, --data.source my/folder. All of them, with what they mean:",
            f"zoo {domain} fit --help",
        ]
    )


def _config_files(args: Sequence[str]) -> list[str]:
    """Values of --config and -c."""
    return _values(args, "--config", "-c")


def _values(args: Sequence[str], *flags: str) -> list[str]:
    """What follows a flag, or an equals sign after its first name."""
    after = [value for flag, value in pairwise(args) if flag in flags]
    return after + [a.partition("=")[2] for a in args if a.startswith(f"{flags[0]}=")]


def _with_ours(args: Sequence[str]) -> list[str]:
    """The same, with the paths of our configs where they lie."""
    here = {flag + name: f"{flag}{config_path(name)}" for name in _config_files(args) for flag in ("", "--config=")}
    return [here.get(a, a) for a in args]


def config_path(name: str) -> Path:
    """A config file; one of ours, configs/DOMAIN/NAME.yaml, also where the current folder does not have it."""
    path = Path(name)
    ours = CONFIGS.parent / path
    return ours if not path.exists() and path.parts[:1] == ("configs",) and ours.is_file() else path


def checked_config(name: str) -> dict[str, Any]:
    """What a config file says; raises ValueError when it does not exist, or is not YAML with sections."""
    path = config_path(name)
    if not path.is_file():
        if path.parent.is_dir():
            known = [str(p) for p in path.parent.rglob("*.yaml")]
        else:
            known = [str(p.relative_to(CONFIGS.parent)) for p in CONFIGS.glob("*/*.yaml")]
        raise unknown("config file", name, known) if known else ValueError(f"there is no config file {name!r}")
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: expected sections model, data and trainer, got {type(content).__name__}")
    return content

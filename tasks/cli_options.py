"""Options of the command line: how jsonargparse reads them, and what it says of those that it cannot read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import get_loader
from jsonargparse._typehints import ActionTypeHint
from lightning.pytorch.cli import LightningArgumentParser

from zoo.nearest import unknown


class ArgumentMistake(Exception):
    """What a user wrote cannot be run as it is."""


def by_option(args: Sequence[str]) -> list[list[str]]:
    """Arguments of a command line, each option with its values."""
    groups: list[list[str]] = []
    for arg in args:
        if arg.startswith("--") or not groups:
            groups.append([arg])
        else:
            groups[-1].append(arg)
    return groups


class Parser(LightningArgumentParser):
    """Turns jsonargparse's errors into one line that names the key and the nearest known ones."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise ArgumentMistake."""
        found = re.search(r"arguments: --([^\s=]+)|does not accept option '([^']+)'", message)
        if found:
            message = str(unknown("option", found[1] or found[2], self._option_names()))
        raise ArgumentMistake(" ".join(message.split())) from ex

    def _option_names(self) -> list[str]:
        """Dotted names of all options of this parser and of its subcommands."""
        names = []
        for action in self._actions:
            names += [o.lstrip("-") for o in action.option_strings if o.startswith("--")]
            for parser in (getattr(action, "choices", None) or {}).values() if action.dest == "subcommand" else ():
                names += parser._option_names()
        return [name for name in names if not name.endswith(".help")]


class Table(ActionTypeHint):
    """An option that is a table, such as model.router: one given whole replaces it, a dotted one changes an entry.

    jsonargparse takes a table with a class_path for a class of its own: a second one ends in an AttributeError, and
    entries of init_args come to lie beside them.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Set what one option says, over what a config file or an earlier option said."""
        if len(args) != 4:
            return super().__call__(*args, **kwargs)
        parser, config, value, option = args
        name = next((o for o in self.option_strings if str(option).startswith(f"{o}.")), None)
        told: Any = config.get(self.dest)
        if name is not None and isinstance(told, dict | None):
            told = dict(told or {})
            *outer, last = str(option).removeprefix(f"{name}.").split(".")
            if last in ("class_path", "name") and not outer:
                told = {}  # the arguments were another class's
            inner = told
            for key in outer:
                inner[key] = dict(inner.get(key) or {})
                inner = inner[key]
            inner[last] = get_loader(parser.parser_mode)(value) if isinstance(value, str) else value
            value, option = told, name
        if isinstance(config.get(self.dest), dict):
            config[self.dest] = None
        return super().__call__(parser, config, value, option)


class Network(ActionTypeHint):
    """An option that is a name or a module: help does not list the hundreds of kinds of modules that there are."""

    def extra_help(self) -> str:
        """Nothing."""
        return ""

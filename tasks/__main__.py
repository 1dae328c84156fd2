"""The command `zoo`, also `python -m tasks`. Only what a command needs is imported, so that help is instant."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from tasks.cli import DOMAINS
from tasks.cli import main as task
from zoo.nearest import unknown

USAGE = """usage: zoo COMMAND ...

train and run models, a domain each (zoo DOMAIN --help):
{domains}

  models [PATTERN]      list models; --routers lists gates
  demo                  train a small mixture of experts and its dense twin, and compare them
  report [FOLDER]       write the report of a demo again, or of a vision-language run
  plan --config FILE    what training takes on so many GPUs, and on which mesh: memory, bytes, time
  bench NAME            measure moe, vision or recommendation against their limit and their rivals
  tune                  search for the fastest tiles of the Triton kernels on this GPU, and keep them
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, 2 for a mistake in the arguments, 130 for Ctrl-C."""
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _unread():
            raise
        return 141  # 128 + SIGPIPE, as other commands end when what they write to, such as head, has gone
    return status


def _unread() -> bool:
    """Whether nobody reads standard output any more; what is left for it is thrown away then."""
    import select

    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(USAGE.format(domains="\n".join(f"  {name:<22}{DOMAINS[name][2]}" for name in DOMAINS)), end="")
        return 0
    command, rest = args[0], args[1:]
    if command in DOMAINS:
        return task(command, rest)
    if command == "--version":
        from zoo import __version__

        print(__version__)
        return 0
    if command not in _COMMANDS:
        return _mistake(unknown("command", command, [*DOMAINS, *_COMMANDS]))
    return _COMMANDS[command](rest)


def models(args: Sequence[str]) -> int:
    """List names of models, or with --routers of gates, that match a pattern."""
    patterns = [a for a in args if not a.startswith("-")]
    options = [a for a in args if a.startswith("-")]
    if {"-h", "--help"} & set(options):
        print("usage: zoo models [PATTERN] [--routers]\n\nPATTERN is a name with wildcards, such as '*mixtral*'")
        return 0
    for option in options:
        if option != "--routers":
            return _mistake(unknown("option of zoo models", option, ["--routers"]))
    if len(patterns) > 1:
        return _mistake(ValueError(f"zoo models takes one pattern, got {', '.join(patterns)}; quote wildcards"))
    pattern = patterns[0] if patterns else "*"
    known = _routers() if options else _models()
    from fnmatch import fnmatchcase

    found = [name for name in known if fnmatchcase(name, pattern)]
    if not found:
        return _mistake(unknown("router" if options else "model", pattern, known))
    width = max(len(name) for name in found) + 2
    print("\n".join(f"{name:{width}}{known[name]}".rstrip() for name in found))
    return 0


def _models() -> dict[str, str]:
    from zoo.models.registry import list_models

    return dict.fromkeys(list_models(), "")


# Layers that come with a gate of their own.
LAYERS = ("DeepMoE", "MixtureOfDepths", "MoA", "MoH", "PEER", "PatchMoE", "SwitchHead")


def _routers() -> dict[str, str]:
    """Each gate's name, with the first sentences of its docstring, paper and formula; then LAYERS, as zoo.moe.NAME."""
    from zoo import moe

    found = vars(moe.routers).values()
    classes = [c for c in found if isinstance(c, type) and issubclass(c, moe.Router) and c is not moe.Router]
    named = {c.__name__: c for c in sorted(classes, key=lambda c: c.__name__)}
    named.update({f"zoo.moe.{name}": getattr(moe, name) for name in LAYERS})
    return {name: " ".join((c.__doc__ or "").split("\n\n")[0].split()) for name, c in named.items()}


def _demo(args: Sequence[str]) -> int:
    from tasks.demo import main

    return main(args)


def _report(args: Sequence[str]) -> int:
    from zoo.report import main

    return main(args)


BENCHMARKS = {
    "moe": "the expert kernels",
    "vision": "a V-MoE and its dense twin, whole",
    "recommendation": "training steps of an MMoE with its tables",
}


def _bench(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        rows = [f"  {name:16}{what} (zoo bench {name} --help)" for name, what in BENCHMARKS.items()]
        print("\n".join(["usage: zoo bench NAME ...", "", *rows]))
        return 0
    if args[0] not in BENCHMARKS:
        return _mistake(unknown("benchmark", args[0], list(BENCHMARKS)))
    return importlib.import_module(f"zoo.bench.{args[0]}").main(args[1:])


def _tune(args: Sequence[str]) -> int:
    from zoo.bench.tune import main

    return main(args)


def _plan(args: Sequence[str]) -> int:
    from tasks.plan import main

    return main(args)


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "models": models,
    "demo": _demo,
    "report": _report,
    "bench": _bench,
    "plan": _plan,
    "tune": _tune,
}


def _mistake(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())

"""Doing something as soon as another library is imported, without importing it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(library: str, module: str, function: str) -> None:
    """Call `module.function()` once module `library` has been imported: now, if it has been already."""
    if sys.modules.get(library) is not None:  # None says: not to be imported
        getattr(importlib.import_module(module), function)()
    else:
        sys.meta_path.insert(0, _Waiting(library, module, function))


class _Waiting(MetaPathFinder):
    """Finds nothing itself: lets the others find `library`, and adds a call behind its execution.

    It stays until then: whoever only asks whether the library is there, as transformers does, looks for it too.
    """

    def __init__(self, library: str, module: str, function: str) -> None:
        self.library, self.module, self.function = library, module, function
        self._asks = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.library or self._asks:
            return None
        self._asks = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asks = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                getattr(importlib.import_module(self.module), self.function)()

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec

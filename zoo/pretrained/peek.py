"""A look at a folder, by which readers tell each other's layouts apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def peek(folder: Path) -> dict[str, Any]:
    """What config.json says; nothing where it cannot be read, as the reader whose folder it is says better why."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}

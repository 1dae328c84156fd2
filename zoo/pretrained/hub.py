"""Where a checkpoint lies: a local folder, or a repository of the Hugging Face hub fetched into its cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Weights and configurations only: nothing that is executed, nothing that is unpickled.
PATTERNS = ["*.safetensors", "*.json"]
# The original authors' layout, which some repositories hold a second time.
LEFT_OUT = ["consolidated*", "original/*"]


def local_folder(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The folder of a checkpoint.

    Raises FileNotFoundError, NotADirectoryError, or ConnectionError with the hub's reason.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; expected a folder with config.json and .safetensors files")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise FileNotFoundError(f"{path}: no such folder, and no repository id of the form owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError("fetching from the hub needs the extra: pip install 'moe-zoo[language]'") from error
    try:
        folder = snapshot_download(
            str(source),
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            token=token,
            allow_patterns=PATTERNS,
            ignore_patterns=LEFT_OUT,
        )
    except Exception as error:
        # The hub's client raises a dozen unrelated types for "no network", "no such repository" and "no access".
        raise ConnectionError(
            f"{source}: no such folder here, and the hub repository could not be fetched: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
        ) from error
    return Path(folder)

"""Writing a folder so that it is complete or not there at all."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@contextmanager
def staged(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `folder`, which becomes `folder` when the block ends, and vanishes when it raises.

    It is inside `folder` where that is there and cannot be replaced: a mounted disk, or in a folder that may not be
    written to. A symbolic link stays one. With `overwrite` the checkpoint files of an existing folder are replaced
    and its other files stay. Raises FileExistsError for a file, and for a folder that is not empty.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"{target} is not empty; give overwrite=True to replace the checkpoint in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    stays = target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK))
    staging = (target if stays else target.parent) / f".{target.name}.{uuid.uuid4().hex}.partial"
    staging.mkdir()
    try:
        yield staging
        _move(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move(staging: Path, target: Path) -> None:
    if staging.parent != target and (not target.exists() or not any(target.iterdir())):
        if target.exists():
            target.rmdir()
        staging.rename(target)
        return
    new = {path.name for path in staging.iterdir()}
    stale = [path for path in target.iterdir() if WEIGHTS.fullmatch(path.name)]
    for name in sorted(new):
        os.replace(staging / name, target / name)
    for path in stale:
        if path.name not in new:
            path.unlink()

"""Files from the net: fetched whole and checked, or not there at all."""

from __future__ import annotations

import hashlib
import tempfile
import urllib.error
import urllib.request
from pathlib import Path


def downloaded(url: str, md5: str | None = None) -> bytes:
    """What is at `url`; raises ConnectionError where it cannot be had, ValueError for another checksum than `md5`."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read()
            announced = answer.headers.get("Content-Length")
    except (urllib.error.URLError, OSError) as error:
        raise ConnectionError(f"cannot fetch {url}: {error}") from error
    if announced and int(announced) != len(content):
        raise ConnectionError(f"{url} broke off: expected {announced} bytes, got {len(content)}")
    if md5 and (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
        raise ValueError(f"{url}: expected the MD5 checksum {md5}, got {found}")
    return content


def written(path: Path, content: bytes) -> None:
    """Write a file in one go: other processes see all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as draft:
        try:
            draft.write(content)
        except BaseException:
            Path(draft.name).unlink()
            raise
    Path(draft.name).chmod(0o644)
    Path(draft.name).replace(path)

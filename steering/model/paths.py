"""Where trimtab keeps things on disk: what the user made, and what can be made again."""

from __future__ import annotations

import json
import os
from pathlib import Path


def data_home() -> Path:
    """Return the folder of vectors, classifiers and presets.

    Returns:
        `$TRIMTAB_HOME`, else `$XDG_DATA_HOME/trimtab`, else `~/.local/share/trimtab`. The folder
        need not exist.
    """
    return _home("TRIMTAB_HOME", "XDG_DATA_HOME", Path(".local", "share"))


def cache_home() -> Path:
    """Return the folder of what can be made again, such as the converted default model.

    Returns:
        `$TRIMTAB_CACHE`, else `$XDG_CACHE_HOME/trimtab`, else `~/.cache/trimtab`. The folder need
        not exist.
    """
    return _home("TRIMTAB_CACHE", "XDG_CACHE_HOME", Path(".cache"))


def model_id(model: str) -> str:
    """Return the name a model is served under: a folder's own name, else what was given."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def store_id(model: str) -> str:
    """Return the id under whose name a model's vectors, classifiers and presets are kept.

    A quantised folder keeps them with its original, which it names: what was made on one serves
    both.

    Args:
        model: a folder, a Hugging Face id or the default model's name.
    """
    path = Path(model).expanduser() / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        original = config["trimtab_quantization"]["source"]["id"]
    # Not quantised, or not readable: whoever loads the model says what is wrong with it.
    except (OSError, ValueError, KeyError, TypeError):
        return model_id(model)
    return original if isinstance(original, str) and original else model_id(model)


def _home(own: str, xdg: str, fallback: Path) -> Path:
    named = os.environ.get(own)
    if named:
        return Path(named).expanduser().absolute()
    base = os.environ.get(xdg, "")
    # The XDG specification says that a relative path there is invalid and must be ignored.
    if os.path.isabs(base):
        return Path(base) / "trimtab"
    return Path.home() / fallback / "trimtab"

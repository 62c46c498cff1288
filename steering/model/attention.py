"""Exchange a model's attention function for the time of a forward pass, and only for that time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def attention_configs(model: nn.Module) -> list[Any]:
    """Return the distinct configs of a model's parts; each names its attention function."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return list(configs.values())


@contextmanager
def attending_by(configs: Sequence[Any], name: str) -> Iterator[None]:
    """Make a model with these configs use an attention function inside the block.

    Args:
        configs: the model's, from `attention_configs`.
        name: what the function is registered as with transformers.
    """
    saved = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, own in zip(configs, saved, strict=True):
            config._attn_implementation_internal = own

"""Run an op where its kernels can run, with tensors that are kept on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
import torch

from trimtab.kernels.dispatch import Implementation, using

IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=pytest.mark.triton)]
"""Parameters of a fixture that runs a file's tests with each implementation."""

_device = torch.device("cpu")


@contextmanager
def implemented(name: Implementation, device: torch.device) -> Iterator[None]:
    """Take one implementation inside the block, and for ops that are `on_device` its device."""
    global _device
    _device = device if name == "triton" else torch.device("cpu")
    try:
        with using(name):
            yield
    finally:
        _device = torch.device("cpu")


def on_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Return an op that moves its tensors to the device and its results, also in place, back."""

    @wraps(op)
    def moved(*args: Any, **kwargs: Any) -> Any:
        if _device.type == "cpu":
            return op(*args, **kwargs)
        there: list[tuple[torch.Tensor, torch.Tensor]] = []
        result = op(*_moved(args, there), **_moved(kwargs, there))
        for here, elsewhere in there:
            back = elsewhere.cpu()
            if not torch.equal(here, back):
                here.copy_(back)
        return result.cpu() if isinstance(result, torch.Tensor) else result

    return moved


def _moved(value: Any, there: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    if isinstance(value, torch.Tensor):
        there.append((value, value.to(_device)))
        return there[-1][1]
    if isinstance(value, dict):
        return {name: _moved(one, there) for name, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(one, there) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **_moved(named, there))
    return value

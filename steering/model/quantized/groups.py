"""`quantization_config` of compressed-tensors: which module is stored how."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.steering.errors import ModelLoadError, listed
from trimtab.steering.model.quantized.facts import Activations
from trimtab.steering.model.quantized.layout import Layout

METHOD = "compressed-tensors"
_CLASS = "Linear"
_SUPPORTED = "FP4 (NVFP4, MXFP4), INT4 and FP8 weights, with activations as they are or in FP8"
_HINT = (
    f"trimtab reads {_SUPPORTED}. Quantise the original model with `trimtab quantize`, or serve "
    "this one with --engine vllm."
)


@dataclass(frozen=True)
class Group:
    """Modules that are stored alike.

    Attributes:
        layout: how.
        targets: names of modules, `re:` and a pattern, or the name of their class.
        activations: `fp8` where the file says that each token is rounded to FP8.
        unused: what the file says of activations and we leave out, a phrase, or None.
    """

    layout: Layout
    targets: tuple[str, ...]
    activations: Activations
    unused: str | None

    def names(self, module: str) -> bool:
        """Whether a target names the module itself."""
        return any(
            re.match(target[3:], module) if target.startswith("re:") else target == module
            for target in self.targets
        )


def write_groups(
    layouts: Mapping[str, Layout], *, ignore: Iterable[str], has_fp8_activations: bool
) -> dict[str, Any]:
    """Return the `quantization_config` of a model.

    Args:
        layouts: by the module's name in the checkpoint.
        ignore: names of linear modules that are kept as they are.
        has_fp8_activations: whether FP8 modules have FP8 activations.
    """
    by_layout: dict[Layout, list[str]] = {}
    for name, layout in layouts.items():
        by_layout.setdefault(layout, []).append(name)
    is_mixed = len(by_layout) > 1
    groups = {
        f"group_{i}": layout.config_group(
            sorted(names) if is_mixed else [_CLASS], has_fp8_activations=has_fp8_activations
        )
        for i, (layout, names) in enumerate(by_layout.items())
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": "mixed-precision" if len(formats) > 1 else formats.pop(),
        "global_compression_ratio": None,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
    }


def read_groups(config: Any, *, where: str) -> list[Group]:
    """Return the groups of a `quantization_config`.

    Raises:
        ModelLoadError: what it describes is not ours to read, with the part at fault.
    """
    try:
        method, status = config["quant_method"], config.get("quantization_status")
        groups = dict(config["config_groups"])
        extras = [key for key in ("sparsity_config", "transform_config") if config.get(key)]
        if method != METHOD:
            raise _refusal(where, f"its weights are quantised by {method!r}")
        if status not in (None, "compressed"):
            raise _refusal(where, f"its quantization_status is {status!r}, not 'compressed'")
        if extras:
            raise _refusal(where, f"it has a {extras[0]}")
        read = [
            _group(group, overall=config.get("format"), where=where) for group in groups.values()
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelLoadError(
            f"{where} has an unreadable quantization_config in its config.json: {error!r}. {_HINT}"
        ) from None
    if not read:
        raise _refusal(where, "its quantization_config has no groups")
    return read


def group_of(module: str, groups: list[Group], *, where: str) -> Group:
    """Return the group of a quantised module: one that names it, else one of all linear modules.

    Raises:
        ModelLoadError: none.
    """
    for group in groups:
        if group.names(module):
            return group
    for group in groups:
        if _CLASS in group.targets:
            return group
    raise ModelLoadError(
        f"{where} has quantised weights for {module!r}, and no group of its quantization_config "
        f"names it; targets are {listed(t for g in groups for t in g.targets)}."
    )


def _group(group: Any, *, overall: Any, where: str) -> Group:
    weights, inputs = group["weights"], group.get("input_activations")
    if weights is None:
        raise _refusal(where, "a group quantises activations only")
    if group.get("output_activations"):
        raise _refusal(where, "it quantises outputs")
    activations, unused = _activations(inputs)
    return Group(
        layout=_layout(weights, stored=group.get("format") or overall, where=where),
        targets=tuple(str(target) for target in group["targets"]),
        activations=activations,
        unused=unused,
    )


def _layout(weights: Any, *, stored: Any, where: str) -> Layout:
    bits, kind, strategy = weights["num_bits"], weights["type"], weights.get("strategy")
    size, is_symmetric = weights.get("group_size"), weights.get("symmetric", True)
    seen = (bits, kind, strategy)
    if weights.get("actorder") in ("group", "dynamic"):
        raise _refusal(where, "its columns are reordered (actorder 'group')")
    if is_symmetric and stored == "nvfp4-pack-quantized" and seen == (4, "float", "tensor_group"):
        return Layout("nvfp4", 16)
    if is_symmetric and stored == "mxfp4-pack-quantized" and seen == (4, "float", "group"):
        return Layout("mxfp4", 32)
    if stored == "pack-quantized" and (bits, kind) == (4, "int"):
        name = "int4" if is_symmetric else "int4-asym"
        if strategy == "group" and isinstance(size, int) and size > 0:
            return Layout(name, size)
        if strategy == "channel":
            return Layout(name, None)
    is_fp8 = stored in ("float-quantized", "naive-quantized") and (bits, kind) == (8, "float")
    if is_symmetric and is_fp8 and strategy in ("channel", "tensor"):
        return Layout("fp8", None)
    raise _refusal(
        where, f"it has {bits}-bit {kind} weights by {strategy or 'tensor'} stored as {stored!r}"
    )


def _activations(inputs: Any) -> tuple[Activations, str | None]:
    if inputs is None:
        return "same", None
    bits, kind, strategy = inputs["num_bits"], inputs["type"], inputs.get("strategy")
    if (bits, kind, strategy, inputs.get("dynamic")) == (8, "float", "token", True):
        return "fp8", None
    return "same", f"{bits}-bit {kind} activations"


def _refusal(where: str, problem: str) -> ModelLoadError:
    return ModelLoadError(f"{where} cannot be loaded: {problem}. {_HINT}")

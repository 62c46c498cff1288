"""Whether a quantised checkpoint is ours to run on vLLM, decided from its configuration alone.

    a folder made by `trimtab quantize`     ours, on every device
    a folder of somebody else's             vLLM's own, as ever; but on a CPU ours, if every weight
                                            of it that vLLM has no kernel for is in a format of ours
    --quantization trimtab                  ours, or refused by name
    --quantization compressed-tensors       vLLM's own, or refused where it would leave out what
                                            the folder says

Nothing here imports vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from trimtab.kernels.formats import Format, format_named
from trimtab.steering.errors import ModelLoadError

logger = logging.getLogger(__name__)

METHOD = "trimtab"
THEIRS = "compressed-tensors"
FACTS = "trimtab_quantization"
"""The key of config.json under which `trimtab quantize` says what it did."""


def choice(
    config: Mapping[str, Any], asked: str | None, facts: Mapping[str, Any] | None, *, is_cpu: bool
) -> str | None:
    """Return `trimtab` if this checkpoint is run by our method, None to leave it to vLLM.

    Args:
        config: `quantization_config` of config.json.
        asked: what `--quantization` names.
        facts: `trimtab_quantization` of config.json, None in other people's folders.
        is_cpu: whether vLLM runs on a CPU.

    Raises:
        ModelLoadError: our method was asked for and cannot run this, or vLLM's own and would
            compute something else than the folder says.
    """
    if config.get("quant_method") != THEIRS:
        return None
    if facts is not None:
        return _choice_of_ours(asked, facts)
    if asked not in (None, METHOD):
        return None
    groups = config.get("config_groups") or {}
    formats = {name: four_bit_format(group) for name, group in groups.items()}
    if asked == METHOD:
        foreign = sorted(name for name, format in formats.items() if format is None)
        if foreign or not formats:
            raise ModelLoadError(
                f"--quantization trimtab runs 4-bit weights without quantised inputs, and "
                f"{' and '.join(foreign) or 'this checkpoint'} of its quantization_config is "
                "something else. Leave the option out: vLLM may have a method of its own."
            )
        return METHOD
    is_stuck = any(f is not None and not f.name.startswith("int4") for f in formats.values())
    if is_cpu and is_stuck:
        named = sorted({f.name for f in formats.values() if f is not None})
        logger.warning(
            "vLLM has no kernel for %s weights on a CPU; trimtab's run this checkpoint.",
            " and ".join(named),
        )
        return METHOD
    return None


def _choice_of_ours(asked: str | None, facts: Mapping[str, Any]) -> str | None:
    if asked in (None, METHOD):
        return METHOD
    if asked == THEIRS:
        left_out = [
            what
            for what, is_there in (
                ("inputs rounded to FP8", facts.get("activations") == "fp8"),
                ("low-rank factors", bool(facts.get("lorc"))),
            )
            if is_there
        ]
        if left_out:
            raise ModelLoadError(
                f"This folder asks for {' and '.join(left_out)}, which vLLM's own compressed-"
                "tensors method leaves out. Leave --quantization out: trimtab's method runs it."
            )
    return None


def four_bit_format(group: Mapping[str, Any]) -> Format | None:
    """Return the 4-bit format of a group of compressed-tensors' configuration, None if none of ours.

    Args:
        group: with `weights` and `input_activations`, as in config.json.
    """
    weights = group.get("weights")
    if not weights or group.get("input_activations") or group.get("output_activations"):
        return None
    if weights.get("num_bits") != 4 or weights.get("dynamic"):
        return None
    if weights.get("actorder") not in (None, False, "static", "weight"):
        return None  # columns in another order than the groups
    kind = weights.get("type"), weights.get("strategy"), weights.get("group_size")
    is_symmetric = weights.get("symmetric", True)
    if kind == ("float", "tensor_group", 16) and is_symmetric:
        return format_named("nvfp4")
    if kind == ("float", "group", 32) and is_symmetric:
        return format_named("mxfp4")
    if kind[:2] == ("int", "group") and isinstance(kind[2], int) and kind[2] % 8 == 0:
        return format_named("int4" if is_symmetric else "int4-asym", group_size=kind[2])
    return None

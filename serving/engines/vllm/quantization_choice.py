"""Whether a quantised checkpoint is ours to run on vLLM, decided from its configuration alone.

    a folder made by `trimtab quantize`     ours, on every device
    a folder of somebody else's             vLLM's own, as ever; but ours if it has weights that
                                            vLLM has no kernel for on this device, and we have
    --quantization trimtab                  ours, or refused by name
    --quantization compressed-tensors       vLLM's own, or refused where it would leave out what
                                            the folder says

Nothing here imports vLLM.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.quantized.facts import KEY, QuantizationFacts, facts_from_json
from trimtab.steering.model.quantized.folder import read_folder
from trimtab.steering.model.quantized.groups import METHOD as THEIRS
from trimtab.steering.model.quantized.groups import Group, read_groups

logger = logging.getLogger(__name__)

METHOD = "trimtab"


def choice(
    config: Mapping[str, Any],
    asked: str | None,
    facts: Any,
    *,
    lacks: Callable[[Group], bool],
) -> str | None:
    """Return `trimtab` if this checkpoint is run by our method, None to leave it to vLLM.

    Args:
        config: `quantization_config` of config.json.
        asked: what `--quantization` names.
        facts: `trimtab_quantization` of config.json, None in other people's folders.
        lacks: whether vLLM has no kernel for such a group on this device.

    Raises:
        ModelLoadError: our method was asked for and cannot run this, or vLLM's own and would
            compute something else than the folder says.
    """
    if config.get("quant_method") != THEIRS:
        return None
    if facts is not None:
        return _choice_of_ours(asked, facts_from_json(facts, where="This model"))
    if asked not in (None, METHOD):
        return None
    groups = {
        name: readable(group, stored=config.get("format"))
        for name, group in (config.get("config_groups") or {}).items()
    }
    if asked == METHOD:
        foreign = sorted(name for name, group in groups.items() if group is None)
        if foreign or not groups:
            raise ModelLoadError(
                f"--quantization {METHOD} does not run {' and '.join(foreign) or 'this model'} of "
                "its quantization_config. Leave the option out: vLLM may have a method of its own."
            )
        return METHOD
    stuck = {group.layout.format for group in groups.values() if group and lacks(group)}
    if not stuck:
        return None
    logger.warning(
        "vLLM has no kernel for these %s weights on this device; trimtab's are used.",
        " and ".join(sorted(stuck)),
    )
    return METHOD


def _choice_of_ours(asked: str | None, facts: QuantizationFacts) -> str | None:
    if asked in (None, METHOD):
        return METHOD
    left_out = []
    if facts.activations == "fp8":
        left_out.append("activations rounded to FP8")
    if facts.lorc_rank:
        left_out.append("low-rank corrections")
    if asked == THEIRS and left_out:
        raise ModelLoadError(
            f"This model was quantised for {' and '.join(left_out)}, which --quantization {THEIRS} "
            "leaves out. Leave the option out: trimtab's method runs it."
        )
    return None


def readable(group: Mapping[str, Any], *, stored: str | None) -> Group | None:
    """Return a group of `quantization_config` as our kernels would run it, None if they cannot.

    Args:
        group: as in config.json.
        stored: how all groups are stored that do not say it themselves.
    """
    alone = {"quant_method": THEIRS, "format": stored, "config_groups": {"group": group}}
    try:
        (found,) = read_groups(alone, where="The model")
    except ModelLoadError:
        return None
    return None if found.unused else found


def check_folder(model: str) -> QuantizationFacts | None:
    """Look at a folder made by `trimtab quantize` before anything is started.

    Args:
        model: what vLLM is given: a folder or a Hugging Face id.

    Returns:
        How it was quantised; None for whatever else it is.

    Raises:
        ModelLoadError: the folder is cut short, or not what its config.json says.
    """
    path = Path(model).expanduser()
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # a name, or a folder that vLLM refuses in its own words
    if not isinstance(config, dict) or KEY not in config:
        return None
    folder = read_folder(path)
    assert folder is not None
    if folder.facts.lorc_rank:
        folder.low_rank()
    return folder.facts

"""The quantisation method `trimtab`, which vLLM is taught in each of its processes.

It is vLLM's own compressed-tensors method with other schemes for the weights that are ours, so that
which layers are quantised, what is left out and how merged layers are named is read as vLLM reads
it. FP8 weights are ours on a CPU only: on a GPU vLLM's own kernels multiply them, and bf16 ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.platforms import current_platform

from trimtab.serving.engines.vllm.low_rank import LowRankFile
from trimtab.serving.engines.vllm.quantization_choice import METHOD, check_folder, choice, readable
from trimtab.serving.engines.vllm.quantized_linear import QuantizedScheme, register_op
from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.quantized.facts import KEY, QuantizationFacts, facts_from_json
from trimtab.steering.model.quantized.groups import Group
from trimtab.steering.model.quantized.writer import LORC_NAME


def register_quantization() -> None:
    """Make the method known to vLLM in this process."""
    register_op()
    register_quantization_config(METHOD)(TrimtabQuantization)


class TrimtabQuantization(CompressedTensorsConfig):
    """A quantised checkpoint that our kernels run.

    Attributes:
        facts: what `trimtab quantize` wrote about the folder; None for other people's.
        low_rank: the folder's factors, if it has any.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.facts: QuantizationFacts | None = None
        self.low_rank: LowRankFile | None = None

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Say whether a checkpoint is ours, see `choice`."""
        return choice(hf_quant_cfg, user_quant, getattr(hf_config, KEY, None), lacks=_vllm_lacks)

    def get_name(self) -> str:
        """Return the method's name."""
        return METHOD

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Take what the configuration does not hand to `from_config`.

        Raises:
            ModelLoadError: the folder is not whole.
        """
        facts = getattr(hf_config, KEY, None)
        if facts is None:
            return
        check_folder(model_name)
        self.facts = facts_from_json(facts, where=f"The model {model_name!r}")
        if self.facts.lorc_rank:
            self.low_rank = LowRankFile(_beside(model_name, revision=revision))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename what is named after layers, as vLLM renames those."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        if self.low_rank is not None:
            self.low_rank.rename(
                lambda name: next(iter(hf_to_vllm_mapper.apply_list([name])), None)
            )

    def get_scheme(self, layer: Any, layer_name: str | None = None) -> Any:
        """Return our scheme for the weights that are ours, and vLLM's own for others.

        Raises:
            ModelLoadError: matrices of one layer are quantised unlike each other, or the layer is
                of a kind that our kernels do not run.
        """
        name = layer_name or ""
        group = self._group(layer, name)
        if group is None:
            return super().get_scheme(layer, layer_name)
        if not isinstance(layer, LinearBase):
            raise ModelLoadError(f"{name}: trimtab runs {group.layout.format} linear layers only.")
        self._check_scheme_supported(QuantizedScheme.get_min_capability())
        asks_fp8 = self.facts is not None and self.facts.activations == "fp8"
        return QuantizedScheme(
            name,
            layout=group.layout,
            activations="fp8" if asks_fp8 else group.activations,
            matrices=self._matrices(name),
            low_rank=self.low_rank,
        )

    def _group(self, layer: Any, name: str) -> Group | None:
        """Return how a layer's matrices are quantised, None if they are not or not ours to run."""
        found = [self.get_scheme_dict(layer, one) for one in self._matrices(name)]
        if any(one != found[0] for one in found):
            raise ModelLoadError(
                f"vLLM makes one layer of {' and '.join(self._matrices(name))}, and here they are "
                "quantised unlike each other. Quantise them alike, or use the embedded engine."
            )
        if not found[0]:
            return None
        group = readable(_plain(found[0]), stored=self.quant_format)
        is_theirs = group is not None and group.layout.format == "fp8"
        return None if is_theirs and not current_platform.is_cpu() else group

    def _matrices(self, name: str) -> list[str]:
        """Return the checkpoint's names of the matrices that vLLM keeps in one layer."""
        parent, _, last = name.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        return [f"{parent}.{part}" if parent else part for part in parts]


def _vllm_lacks(group: Group) -> bool:
    """Whether vLLM has no kernel for such weights on this device."""
    if not current_platform.is_cpu():
        return False
    if group.layout.format == "fp8":
        return not torch.cpu._is_amx_tile_supported()
    return not group.layout.format.startswith("int4") or group.activations == "fp8"


def _plain(scheme: dict[str, Any]) -> dict[str, Any]:
    """Return what vLLM has parsed of a group as it is in config.json."""
    names = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "actorder")

    def values(args: Any) -> dict[str, Any] | None:
        if args is None:
            return None
        found = {name: getattr(args, name, None) for name in names}
        return {name: getattr(value, "value", value) for name, value in found.items()}

    activations = ("weights", "input_activations", "output_activations")
    plain: dict[str, Any] = {what: values(scheme.get(what)) for what in activations}
    return plain | {"targets": [], "format": scheme.get("format")}


def _beside(model: str, *, revision: str | None) -> Path:
    """Return where a checkpoint's low-rank factors are, fetched if it is not a folder."""
    folder = Path(model)
    if folder.is_dir():
        return folder / LORC_NAME
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, LORC_NAME, revision=revision))

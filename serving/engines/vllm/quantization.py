"""The quantisation method `trimtab`, which vLLM is taught in each of its processes.

It is vLLM's own compressed-tensors method with other schemes for 4-bit weights, so that which
layers are quantised, what is left out and how merged layers are named is read as vLLM reads it,
and layers in FP8 or bf16 stay vLLM's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.platforms import current_platform

from trimtab.kernels.formats import Format
from trimtab.serving.engines.vllm.low_rank import FILE, LowRankFile
from trimtab.serving.engines.vllm.quantization_choice import FACTS, METHOD, choice, four_bit_format
from trimtab.serving.engines.vllm.quantized_linear import FourBitScheme, register_op
from trimtab.steering.errors import ModelLoadError


def register_quantization() -> None:
    """Make the method known to vLLM in this process."""
    register_op()
    register_quantization_config(METHOD)(TrimtabQuantization)


class TrimtabQuantization(CompressedTensorsConfig):  # type: ignore[misc]
    """A quantised checkpoint that our kernels run.

    Attributes:
        facts: what `trimtab quantize` wrote about the folder; empty for other people's.
        low_rank: the folder's factors, if it has any.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.facts: dict[str, Any] = {}
        self.low_rank: LowRankFile | None = None

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Say whether a checkpoint is ours, see `choice`."""
        facts = getattr(hf_config, FACTS, None)
        return choice(hf_quant_cfg, user_quant, facts, is_cpu=current_platform.is_cpu())

    def get_name(self) -> str:
        """Return the method's name."""
        return METHOD

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Take what the configuration does not hand to `from_config`.

        Raises:
            ModelLoadError: the folder says that it has low-rank factors, and they are not there.
        """
        self.facts = dict(getattr(hf_config, FACTS, None) or {})
        if self.facts.get("lorc"):
            self.low_rank = LowRankFile(_beside(model_name, revision=revision))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename what is named after layers, as vLLM renames those."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        if self.low_rank is not None:
            self.low_rank.rename(
                lambda name: next(iter(hf_to_vllm_mapper.apply_list([name])), None)
            )

    def get_scheme(self, layer: Any, layer_name: str | None = None) -> Any:
        """Return our scheme for 4-bit weights, and vLLM's own for others.

        Raises:
            ModelLoadError: matrices of one layer are quantised unlike each other, or 4-bit weights
                in a layer that is not linear.
        """
        name = layer_name or ""
        format = self._format(layer, name)
        if format is None:
            return super().get_scheme(layer, layer_name)
        if not isinstance(layer, LinearBase):
            raise ModelLoadError(f"{name}: trimtab runs 4-bit weights of linear layers only.")
        self._check_scheme_supported(FourBitScheme.get_min_capability())
        return FourBitScheme(
            name,
            format=format,
            activations="fp8" if self.facts.get("activations") == "fp8" else "same",
            matrices=self._matrices(name),
            low_rank=self.low_rank,
        )

    def _format(self, layer: Any, name: str) -> Format | None:
        found = [self._group(layer, one) for one in self._matrices(name)]
        if any(one != found[0] for one in found):
            raise ModelLoadError(
                f"vLLM makes one layer of {' and '.join(self._matrices(name))}, and here they are "
                "quantised unlike each other. Quantise them alike, or use the embedded engine."
            )
        return four_bit_format(found[0]) if found[0] else None

    def _group(self, layer: Any, name: str) -> dict[str, Any] | None:
        """Return how one matrix of the checkpoint is quantised, None if it is not."""
        scheme = self.get_scheme_dict(layer, name)
        if not scheme:
            return None
        return {
            what: _plain(scheme.get(what))
            for what in ("weights", "input_activations", "output_activations")
        }

    def _matrices(self, name: str) -> list[str]:
        """Return the checkpoint's names of the matrices that vLLM keeps in one layer."""
        parent, _, last = name.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        return [f"{parent}.{part}" if parent else part for part in parts]


def _plain(args: Any) -> dict[str, Any] | None:
    if args is None:
        return None
    names = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "actorder")
    values = ((name, getattr(args, name, None)) for name in names)
    return {name: getattr(value, "value", value) for name, value in values}


def _beside(model: str, *, revision: str | None) -> Path:
    """Return where a checkpoint's low-rank factors are, fetched if it is not a folder."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / FILE).is_file():
            raise ModelLoadError(f"{folder} has lost its {FILE}, which its config.json speaks of.")
        return folder / FILE
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, FILE, revision=revision))

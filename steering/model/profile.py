"""Facts about a loaded model that steering needs: identity, layers, typical hidden norms."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimtab.steering.artifact import ModelRef
from trimtab.steering.model.decoder import find_decoder_layers, text_config
from trimtab.steering.model.hooks import captured
from trimtab.steering.model.loading import loader_for
from trimtab.steering.model.quantized.facts import QuantizationFacts
from trimtab.steering.model.quantized.folder import facts_of
from trimtab.steering.model.quantized.linear import QuantizedLinear
from trimtab.steering.model.quantized.load import quantization_of, without_quantization

# Keys of a config that do not change what the weights compute.
_VOLATILE = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
    "_attn_implementation_autoset",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    # A vector built on the original serves the quantised model, and the other way round.
    "quantization_config",
    "trimtab_quantization",
}

_SAMPLE = (
    "The library opens at nine. People return books, read the papers by the window and ask for "
    "help with forms. In winter the reading room is warm and full; in summer the children come "
    "for stories. A small garden behind the building has two benches, an apple tree and a path "
    "of grey stones that leads down to the river."
)


@dataclass(frozen=True)
class ModelProfile:
    """What steering knows about a model.

    Attributes:
        ref: identity written into artifacts.
        layers: the decoder layers, first to last.
        hidden_norms: median |h| at each layer's output on plain text, `[n_layers]`, float32. The
            first token is left out: as an attention sink its norm is far larger.
        max_context: tokens the model can attend to.
    """

    ref: ModelRef
    layers: tuple[nn.Module, ...]
    hidden_norms: torch.Tensor
    max_context: int


def fingerprint(model: nn.Module) -> str:
    """Return SHA-256 of the config and of every weight's name and shape, quantised or not."""
    config: Any = model.config
    facts = _lasting(config.to_dict())
    weights = [(name, list(p.shape)) for name, p in model.named_parameters()]
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weights.append((f"{name}.weight", [module.out_features, module.in_features]))
    shapes = sorted(weights)
    text = json.dumps([facts, shapes], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _lasting(facts: Any) -> Any:
    if isinstance(facts, dict):
        return {k: _lasting(v) for k, v in facts.items() if k not in _VOLATILE}
    return facts


def profile_model(model: Any, *, model_id: str, tokenizer: Any = None) -> ModelProfile:
    """Measure a loaded model.

    Args:
        model: a causal language model in eval mode.
        model_id: name to write into artifacts.
        tokenizer: its tokenizer; without one, fixed token ids stand in for text.

    Raises:
        ModelLoadError: no decoder layers found.
    """
    layers = find_decoder_layers(model)
    config = text_config(model)
    max_context = int(getattr(config, "max_position_embeddings", 0) or 2048)
    ids = sample_ids(tokenizer, vocab_size=config.vocab_size, max_context=max_context)
    device = next(model.parameters()).device
    with torch.no_grad(), captured(layers, range(len(layers))) as states:
        model(input_ids=torch.tensor([ids], device=device), use_cache=False)
        norms = [states[i][0, 1:].float().norm(dim=-1).median() for i in range(len(layers))]
    return ModelProfile(
        ref=_ref(
            model, model_id=model_id, n_layers=len(layers), quantization=quantization_of(model)
        ),
        layers=tuple(layers),
        hidden_norms=torch.stack(norms).cpu().clamp_min(1e-6),
        max_context=max_context,
    )


def sample_ids(tokenizer: Any, *, vocab_size: int, max_context: int) -> list[int]:
    """Return the tokens on which typical norms are measured; the first is not counted.

    Args:
        tokenizer: the model's; without one, fixed ids stand in for text.
        vocab_size: of the model.
        max_context: most tokens it can attend to.
    """
    ids = tokenizer(_SAMPLE)["input_ids"] if tokenizer is not None else None
    if not ids:
        ids = [(7 * i) % vocab_size for i in range(1, 48)]
    return list(ids[: min(max_context, 256)])


def ref_without_weights(source: str, *, model_id: str) -> ModelRef:
    """Return the identity of a model that is loaded elsewhere, from its configuration alone.

    Args:
        source: a folder or Hugging Face id.
        model_id: name to write into artifacts.

    Raises:
        ModelLoadError: not a decoder-only language model.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    facts = facts_of(vars(config), where=f"The model {source!r}")
    config = without_quantization(config)
    with torch.device("meta"):
        model = loader_for(config).from_config(config)
    n_layers = int(text_config(model).num_hidden_layers)
    return _ref(model, model_id=model_id, n_layers=n_layers, quantization=facts)


def _ref(
    model: Any, *, model_id: str, n_layers: int, quantization: QuantizationFacts | None
) -> ModelRef:
    return ModelRef(
        id=model_id,
        fingerprint=fingerprint(model),
        model_type=model.config.model_type,
        hidden_size=text_config(model).hidden_size,
        n_layers=n_layers,
        quantization=None if quantization is None else quantization.label,
    )

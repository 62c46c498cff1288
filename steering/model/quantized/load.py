"""Load a quantised folder: transformers builds the model and its other weights, we the matrices.

transformers is given a model whose quantised layers have no weight, so it reads, renames, ties and
places all the rest as it always does. Then the matrices are read one at a time, made ready for the
device, and put in: at no time are more than one of them there both packed and dequantised.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn

from trimtab.kernels.formats import Fp8Matrix
from trimtab.kernels.matmul import Activations, PreparedWeight, prepare
from trimtab.kernels.matmul.dense import DenseWeight
from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model.quantized.facts import KEY, STANDARD_KEY, QuantizationFacts
from trimtab.steering.model.quantized.folder import QuantizedFolder
from trimtab.steering.model.quantized.fp8_weight import Fp8Weight
from trimtab.steering.model.quantized.layout import Matrix
from trimtab.steering.model.quantized.linear import QuantizedLinear

# On the model itself, because whoever has it must not be able to forget what it is.
_FACTS = "trimtab_quantization_facts"


def load_quantized(
    folder: QuantizedFolder,
    *,
    model_class: type[Any],
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Any, dict[str, Any], str]:
    """Load the model of a quantised folder.

    Args:
        folder: as `read_folder` found it.
        model_class: of transformers, such as `LlamaForCausalLM`.
        config: of the folder; it is not changed.
        device: where the weights go.
        dtype: of everything that is not quantised.

    Returns:
        The model, with `nn.Linear` where the device has no use for a packed weight; what
        transformers says of missing and surplus tensors; and what was decided, a sentence.

    Raises:
        ModelLoadError: a tensor that is missing, damaged, or belongs to another model.
    """
    names: dict[str, str] = {}  # the module of each matrix of the checkpoint
    model, info = _with_empty_layers(model_class, folder, names).from_pretrained(
        None,
        config=without_quantization(config),
        state_dict=dict(folder.plain_tensors()),
        dtype=dtype,
        device_map=None if device.type == "cpu" else {"": device},
        output_loading_info=True,
    )
    model.__class__ = model_class
    model.config.name_or_path = model.name_or_path = str(folder.path)
    _read_generation_config(model, folder)
    factors = folder.low_rank()
    ways: Counter[str] = Counter()
    n_bytes = 0
    for name, matrix in folder.matrices():
        group = folder.groups[name]
        activations: Activations = "fp8" if folder.facts.activations == "fp8" else group.activations
        prepared = _prepared(matrix, device=device, dtype=dtype, activations=activations)
        n_bytes += prepared.n_bytes
        ways[_way(prepared)] += 1
        empty = model.get_submodule(names[name])
        try:
            empty.fill(prepared, low_rank=factors.pop(name, None))
        except ValueError as error:
            raise ModelLoadError(
                f"{folder.path} is not the model that its config.json describes: {name!r} has "
                f"{error}."
            ) from None
        _set_module(model, names[name], _simplest(empty))
    if factors:
        raise ModelLoadError(
            f"{folder.path} has a low-rank correction for {next(iter(factors))!r}, which is not "
            "quantised. Quantise it again with `trimtab quantize`."
        )
    setattr(model, _FACTS, folder.facts)
    return model, info, _told(folder, ways, n_bytes=n_bytes, device=device)


def quantization_of(model: nn.Module) -> QuantizationFacts | None:
    """Return how a loaded model's weights are quantised; None if they are not."""
    return getattr(model, _FACTS, None)


def without_quantization(config: Any) -> Any:
    """Return a copy of a configuration that says nothing of quantisation: the original model's."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config(decoder=True)):
        for key in (STANDARD_KEY, KEY):
            if hasattr(part, key):
                delattr(part, key)
    return plain


def _with_empty_layers(
    model_class: type[Any], folder: QuantizedFolder, names: dict[str, str]
) -> type[Any]:
    """Return the class with layers without weight in place of those that are quantised.

    Args:
        model_class: a class of transformers.
        folder: which modules are quantised.
        names: filled, when a model is made, with the module of each matrix.
    """

    def build(self: Any, config: Any, *args: Any, **options: Any) -> None:
        model_class.__init__(self, config, *args, **options)
        names.update(_modules_of(self, folder))
        for name in names.values():
            old = self.get_submodule(name)
            has_bias = old.bias is not None
            empty = QuantizedLinear(
                old.in_features, old.out_features, bias=has_bias, dtype=old.weight.dtype
            )
            _set_module(self, name, empty)

    body = {"__init__": build, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), body)


def _modules_of(model: nn.Module, folder: QuantizedFolder) -> dict[str, str]:
    """Return the linear module of each quantised matrix of the checkpoint.

    transformers 5 moved the parts of some multimodal models: `language_model.model.layers` of a
    checkpoint is `model.language_model.layers` of the model. Names of the same words are the same
    module, if only one module has them.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    by_words: dict[tuple[str, ...], list[str]] = {}
    for name in linears:
        by_words.setdefault(tuple(sorted(name.split("."))), []).append(name)
    found = {}
    for name in folder.groups:
        alike = by_words.get(tuple(sorted(name.split("."))), [])
        if name in linears:
            found[name] = name
        elif len(alike) == 1:
            found[name] = alike[0]
        else:
            raise ModelLoadError(
                f"{folder.path} has quantised weights for {name!r}, which is no linear layer of a "
                f"{type(model).__name__}. It is another model's folder, or quantised in a way that "
                "trimtab does not read."
            )
    return found


def _prepared(
    matrix: Matrix, *, device: torch.device, dtype: torch.dtype, activations: Activations
) -> PreparedWeight:
    if isinstance(matrix, Fp8Matrix):
        return Fp8Weight(matrix, device=device, dtype=dtype, activations=activations)
    return prepare(matrix.to(device), device=device, dtype=dtype, activations=activations)


def _simplest(layer: QuantizedLinear) -> nn.Module:
    """Return a plain linear layer where the quantised one computes nothing else."""
    prepared = layer.prepared
    is_dense = isinstance(prepared, DenseWeight) and prepared.activations == "same"
    if not is_dense or layer.lorc_a is not None:
        return layer
    assert isinstance(prepared, DenseWeight)
    with torch.device("meta"):  # it would draw random weights first
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
    plain.weight = nn.Parameter(prepared.weight, requires_grad=False)
    plain.register_parameter("bias", layer.bias)
    return plain


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _read_generation_config(model: Any, folder: QuantizedFolder) -> None:
    if (folder.path / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder.path)


def _way(prepared: PreparedWeight) -> str:
    """Return what became of a matrix, a phrase."""
    is_dense = isinstance(prepared, DenseWeight)
    way = (
        f"dequantised to {str(prepared.dtype).removeprefix('torch.')}"
        if is_dense
        else "kept packed"
    )
    return way if prepared.activations == "same" else f"{way}, activations rounded to FP8"


def _told(
    folder: QuantizedFolder, ways: Counter[str], *, n_bytes: int, device: torch.device
) -> str:
    facts = folder.facts
    where = "a CPU" if device.type == "cpu" else str(device)
    parts = [f"{count} matrices {way}" for way, count in ways.items()]
    said = f"{facts.label}, {' and '.join(parts)} on {where}: {n_bytes / 1e6:.0f} MB"
    if facts.lorc_rank:
        said += f", with corrections of rank {facts.lorc_rank}"
    unused = {group.unused for group in folder.groups.values() if group.unused}
    if unused:
        said += f"; the folder's {' and '.join(sorted(unused))} are left as they are, more exact"
    return f"{said}."

"""Toy models quantised into folders, for tests of what reads, loads and serves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from torch import nn
from toys import TOYS
from transformers import PreTrainedTokenizerFast

from trimtab.kernels.formats import format_named, fp8
from trimtab.steering.model.quantized import Matrix, QuantizationFacts, QuantizedFolderWriter

Quantiser = Callable[[str, torch.Tensor], Matrix | None]


def by_format(name: str, *, group_size: int | None = None) -> Quantiser:
    """Quantise every linear layer of the decoder in one format."""
    if name == "fp8":
        return lambda module, weight: fp8.quantize_matrix(weight)
    fmt = format_named(name, group_size=group_size)

    def quantiser(module: str, weight: torch.Tensor) -> Matrix | None:
        is_ragged = weight.shape[1] % fmt.group_size
        return None if is_ragged else fmt.quantize(weight, search="mse")

    return quantiser


def save_original(folder: Path, *, name: str = "llama") -> Path:
    """Save a toy with a tokenizer of one word a token, as a Hugging Face folder."""
    vocab = {f"w{i}": i for i in range(128)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3").save_pretrained(folder)
    TOYS[name]().save_pretrained(folder)
    return folder


def quantise(
    original: Path,
    target: Path,
    quantiser: Quantiser,
    *,
    facts: QuantizationFacts,
    rank: int = 0,
) -> dict[str, torch.Tensor]:
    """Write a quantised folder of a saved model; returns what its matrices are now, by module.

    Layers whose matrix the quantiser answers with None are kept.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig

    from trimtab.steering.model.loading import loader_for

    weights = load_file(original / "model.safetensors")
    with torch.device("meta"):
        model = loader_for(AutoConfig.from_pretrained(original)).from_config(
            AutoConfig.from_pretrained(original)
        )
    # Checkpoints of multimodal toys have the words of a name in another order.
    linears = {
        tuple(sorted(n.split("."))) for n, m in model.named_modules() if isinstance(m, nn.Linear)
    } - {("lm_head",)}
    writer = QuantizedFolderWriter(target, job={"toy": True})
    dense, low_rank, matrices, kept = {}, {}, {}, ["lm_head"]
    generator = torch.Generator().manual_seed(0)
    for name in sorted(n.removesuffix(".weight") for n in weights if n.endswith(".weight")):
        weight = weights[f"{name}.weight"]
        if tuple(sorted(name.split("."))) not in linears:
            continue
        matrix = quantiser(name, weight)
        if matrix is None:
            kept.append(name)
            continue
        del weights[f"{name}.weight"]
        matrices[name], dense[name] = matrix, matrix.dequantize()
        if rank:
            low_rank[name] = (
                torch.randn(weight.shape[0], rank, generator=generator) * 0.05,
                torch.randn(rank, weight.shape[1], generator=generator) * 0.05,
            )
            dense[name] = dense[name] + low_rank[name][0] @ low_rank[name][1]
    writer.write("layers", matrices=matrices, tensors={}, low_rank=low_rank)
    writer.write("rest", matrices={}, tensors=weights)
    writer.finish(original, facts, ignore=kept)
    return dense

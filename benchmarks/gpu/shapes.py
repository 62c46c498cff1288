"""Models of known shapes with random weights: nothing is downloaded, and speed does not care."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

N_WORDS = 1000

LONGEST = 2048
TINY = LlamaConfig(
    vocab_size=N_WORDS,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=LONGEST,
)
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=LONGEST,
)
QWEN_1_5B = Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=LONGEST,
    tie_word_embeddings=True,
)


def shapes(*, tiny: bool) -> dict[str, Any]:
    """Return configurations by name, the smaller first."""
    return {"tiny": TINY} if tiny else {"Qwen2.5-1.5B": QWEN_1_5B, "Llama-3.1-8B": LLAMA_8B}


def random_model(config: Any, *, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a model of this shape, its weights drawn on the device."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def tokenizer() -> Any:
    """Return a tokenizer of words `w0`, `w1`, ...; the benchmarks only ever give it ids."""
    words = {f"w{i}": i for i in range(N_WORDS)}
    made = Tokenizer(models.WordLevel(vocab=words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w2", unk_token="w0")

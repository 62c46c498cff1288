"""A toy chat model: a tiny seeded Llama with one token a byte, chat template and thinking marks."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toys import llama
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trimtab.steering.model.loading import LoadedModel

SPECIALS = ["<|start|>", "<|end|>", "<think>", "</think>"]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a byte, so that other scripts span several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIALS})
    fast.chat_template = TEMPLATE
    return fast


def toy_chat(model: PreTrainedModel | None = None) -> LoadedModel:
    """Return a toy model as the loader would; by default a Llama of width 32 and 2 layers."""
    tokenizer = byte_tokenizer()
    if model is None:
        model = llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    elif model.config.get_text_config().vocab_size < len(tokenizer):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        id="toy",
        source_path=None,
        device=torch.device("cpu"),
        dtype=torch.float32,
        reasons={},
    )


def saved_toy(folder: Path) -> Path:
    """Save a toy model that vLLM can run, whose attention wants heads of at least 32."""
    tokenizer = byte_tokenizer()
    model = llama(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    loaded = toy_chat(model)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder

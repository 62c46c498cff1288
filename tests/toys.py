"""Tiny seeded models, one an architecture: 2 to 4 layers, width 32, vocabulary 128, fp32, eval.

They are built in code, so the tests of "any architecture" need no download. Their weights are
drawn wide enough (`SPREAD`) that every layer visibly changes the output: with transformers' usual
0.02 a model this narrow is nearly the identity, and a steering bug would hide in the rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 128
WIDTH = 32
SPREAD = 0.15
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": SPREAD,
    **SPECIAL,
}


def seeded(model_class: type[PreTrainedModel], config: Any, *, seed: int = 0) -> PreTrainedModel:
    """Build a model with random weights that are the same in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    return model.eval().requires_grad_(False)


def llama(**changes: Any) -> PreTrainedModel:
    config = transformers.LlamaConfig(**SHAPE | changes)
    return seeded(transformers.LlamaForCausalLM, config)


def qwen3() -> PreTrainedModel:
    config = transformers.Qwen3Config(**SHAPE, head_dim=8)
    return seeded(transformers.Qwen3ForCausalLM, config)


def _gemma3_text() -> dict[str, Any]:
    # Four layers, so that sliding-window and full attention both occur.
    return SHAPE | {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }


def gemma3() -> PreTrainedModel:
    config = transformers.Gemma3TextConfig(**_gemma3_text())
    return seeded(transformers.Gemma3ForCausalLM, config)


def gemma3_multimodal() -> PreTrainedModel:
    """A vision tower (2 layers, 28 pixels) and the text decoder under one model."""
    config = transformers.Gemma3Config(
        text_config=_gemma3_text(),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=120,
        boi_token_index=121,
        eoi_token_index=122,
    )
    return seeded(transformers.Gemma3ForConditionalGeneration, config)


def gpt2() -> PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=SPREAD,
        **SPECIAL,
    )
    return seeded(transformers.GPT2LMHeadModel, config)


def mixtral() -> PreTrainedModel:
    config = transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)
    return seeded(transformers.MixtralForCausalLM, config)


def qwen3_moe() -> PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = transformers.Qwen3MoeConfig(**SHAPE, **experts, head_dim=8)
    return seeded(transformers.Qwen3MoeForCausalLM, config)


def mamba() -> PreTrainedModel:
    """A state-space model: no attention, no key-value cache."""
    config = transformers.MambaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        state_size=8,
        initializer_range=SPREAD,
        **SPECIAL,
    )
    return seeded(transformers.MambaForCausalLM, config)


def lfm2() -> PreTrainedModel:
    """A hybrid: layers of short convolution and of attention in turn."""
    changes = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
    config = transformers.Lfm2Config(**SHAPE | changes)
    return seeded(transformers.Lfm2ForCausalLM, config)


def qwen3_next() -> PreTrainedModel:
    """A hybrid: linear attention (gated delta net) and full attention, with experts."""
    config = transformers.Qwen3NextConfig(
        **SHAPE,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    return seeded(transformers.Qwen3NextForCausalLM, config)


def jamba() -> PreTrainedModel:
    """A hybrid: state-space and attention layers in turn, with experts in every second."""
    config = transformers.JambaConfig(
        **SHAPE,
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
    )
    return seeded(transformers.JambaForCausalLM, config)


TOYS: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma3": gemma3,
    "gemma3_multimodal": gemma3_multimodal,
    "gpt2": gpt2,
    "jamba": jamba,
    "lfm2": lfm2,
    "llama": llama,
    "mamba": mamba,
    "mixtral": mixtral,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
}

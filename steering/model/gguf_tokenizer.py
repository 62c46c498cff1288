"""Build SmolLM2's tokenizer from what its GGUF file says, piece by piece.

transformers can read a tokenizer out of a GGUF file, but what it makes of it depends on its
version: 5.9 to 5.17 give this model `<|im_start|>` as the end-of-text token, no padding token and
a decoder that turns a "▁" into a blank; 5.23 has mended that; none splits digits. The parts are
few, so they are put together here and are the same everywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def read_tokenizer(gguf: Path) -> Any:
    """Return the byte-level BPE tokenizer of a GGUF file with `tokenizer.ggml.pre = smollm`.

    Args:
        gguf: the file.

    Returns:
        A `PreTrainedTokenizerFast` with special tokens, chat template and context length.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reader = GGUFReader(gguf)

    def field(key: str) -> Any:
        found = reader.get_field(key)
        if found is None:
            raise ValueError(f"{gguf.name} has no field {key}.")
        return found.contents()

    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    core = Tokenizer(models.BPE(dict(zip(tokens, range(len(tokens)), strict=True)), merges))
    # What `pre = smollm` means: every digit a token of its own, then GPT-2's cutting. Without it
    # "\n  1" becomes other tokens than the model was trained on.
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == TokenType.CONTROL
        ]
    )
    special = {
        f"{ours}_token": tokens[field(f"tokenizer.ggml.{theirs}_token_id")]
        for ours, theirs in SPECIAL.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=field("tokenizer.chat_template"),
        model_max_length=field("llama.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )

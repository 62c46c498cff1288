"""Turn the default model's 4-bit GGUF file into a plain folder that loads in a second.

transformers reads a GGUF file, slowly, but refuses to save what it read. So the weights are
written as safetensors beside a configuration that has forgotten where it came from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.steering.model.gguf_tokenizer import read_tokenizer

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
STAGES = ("reading weights", "reading tokenizer", "saving")


def convert(gguf: Path, folder: Path, *, on_stage: Callable[[str], None]) -> None:
    """Write model, tokenizer and generation settings of a Llama GGUF file into a folder.

    Args:
        gguf: a GGUF file of architecture `llama` with tied embeddings.
        folder: an empty folder.
        on_stage: called with each of `STAGES` as that stage begins.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with quiet_transformers(), _quiet_gguf_reader():
        on_stage(STAGES[0])
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        on_stage(STAGES[1])
        tokenizer = read_tokenizer(gguf)
        on_stage(STAGES[2])
        config = _plain_config(model.config)
        config.save_pretrained(folder)
        _save_weights(model, folder / "model.safetensors")
        tokenizer.save_pretrained(folder)
        ids = {name: getattr(config, name) for name in _SPECIAL_IDS}
        GenerationConfig(**ids).save_pretrained(folder)


def _plain_config(loaded: Any) -> Any:
    from transformers import LlamaConfig

    facts = loaded.to_dict()
    for traces in ("quantization_config", "_model_name_or_path", "_name_or_path", "unk_token_id"):
        facts.pop(traces, None)
    # GGUF stores 1e-5 as a float32, which reads back as 9.999999747e-06.
    facts |= {"rms_norm_eps": 1e-5, "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    return LlamaConfig.from_dict(facts)


def _save_weights(model: Any, path: Path) -> None:
    from safetensors.torch import save_file

    weights = model.state_dict()
    # The output matrix is the embedding: stored once, tied again when the folder is loaded.
    weights.pop("lm_head.weight")
    save_file(weights, path, metadata={"format": "pt"})


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars and loading remarks inside the block."""
    from transformers.utils import logging

    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


@contextmanager
def _quiet_gguf_reader() -> Iterator[None]:
    """Hide the bar of transformers' GGUF reader, which ignores the switch of all the others."""
    import transformers.modeling_gguf_pytorch_utils as reader

    bar = reader.tqdm
    reader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar

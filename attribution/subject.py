"""The model that attribution asks: its embeddings, its attention, and how much it takes at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trimtab.attribution import tree
from trimtab.attribution.errors import TooLargeError
from trimtab.attribution.memory import gradient_bytes
from trimtab.attribution.tree import Tree, Trunk
from trimtab.steering.bank import Bank
from trimtab.steering.model.attention import attention_configs
from trimtab.steering.model.decoder import text_config
from trimtab.steering.model.loading import LoadedModel
from trimtab.steering.model.memory import free_bytes
from trimtab.steering.model.profile import ModelProfile
from trimtab.steering.model.quantized.linear import exact_products
from trimtab.steering.plan import MAX_PARTS

# Tokens that go through the model at once. On a CPU more are no faster (one row of 37 tokens with
# its gradient takes 0.22 s, eight take 1.7 s: SmolLM2-135M, two Zen 5 cores), and whoever waits
# for the model waits longer.
_SLICE_TOKENS = {"cpu": 64}
_SLICE_TOKENS_ELSEWHERE = 8192


class Subject:
    """A loaded model, ready to be asked.

    Its parameters must not require gradients. One thread at a time may run it.

    Args:
        loaded: the model.
        profile: its layers.
        slice_tokens: most tokens of one forward pass, if several rows make it up; None chooses.
    """

    def __init__(
        self, loaded: LoadedModel, profile: ModelProfile, *, slice_tokens: int | None = None
    ) -> None:
        self.model: Any = loaded.model
        self.tokenizer = loaded.tokenizer
        self.device = loaded.device
        self.dtype = loaded.dtype
        self.profile = profile
        self.slice_tokens = slice_tokens or _SLICE_TOKENS.get(
            loaded.device.type, _SLICE_TOKENS_ELSEWHERE
        )
        self.configs = attention_configs(loaded.model)
        # A bank of its own: a live request's slots are never taken for an attribution.
        self.bank = Bank(
            n_layers=len(profile.layers),
            hidden_size=profile.ref.hidden_size,
            device=loaded.device,
            max_slots=MAX_PARTS,
        )
        with exact_products(self.model):
            self.tree_problem = tree_problem(self)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers."""
        return self.profile.layers

    def embeddings(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the input embeddings of tokens, `[n, d_model]`, float32."""
        with torch.inference_mode(False), torch.no_grad():
            table = self.model.get_input_embeddings()
            rows: torch.Tensor = table(torch.tensor(list(ids), device=self.device))
            return rows.float().clone()

    def mean_embedding(self) -> torch.Tensor:
        """Return the mean over the vocabulary, `[d_model]`, float32."""
        with torch.inference_mode(False), torch.no_grad():
            table = self.model.get_input_embeddings()
            n = int(table.weight.shape[0])
            total = torch.zeros(table.weight.shape[1], device=self.device)
            for start in range(0, n, 8192):
                ids = torch.arange(start, min(start + 8192, n), device=self.device)
                total += table(ids).float().sum(0)  # through the module, which may scale
            return total / n

    def check_memory(self, n_tokens: int, *, n_logits: int, n_rows: int) -> None:
        """Refuse a gradient over more tokens than there is memory for.

        Args:
            n_tokens: tokens of one row, prompt and answers.
            n_logits: tokens of the answers.
            n_rows: rows read together.

        Raises:
            TooLargeError: it would need more than what is free now.
        """
        needed = gradient_bytes(self.model, n_tokens, n_logits=n_logits, n_rows=n_rows)
        free = free_bytes(self.device)
        if needed > free:
            raise TooLargeError(
                f"A gradient over {n_tokens} tokens takes about {needed / 2**30:.1f} GiB and "
                f"{free / 2**30:.1f} GiB are free; shorten the prompt."
            )


@torch.inference_mode()
def tree_problem(subject: Subject) -> str | None:
    """Return why a model cannot read several answers in one row, or None if it can.

    Two answers to one prompt are read as a tree, its beginning kept from an earlier pass, and
    compared with the model run on each alone. The numbers decide, not a list of architectures.
    """
    model, device = subject.model, subject.device
    vocab = int(text_config(model).vocab_size)
    prompt = [(11 * i) % vocab for i in range(1, 14)]
    answers = [[(7 * i + 3 + j) % vocab for i in range(4 + 2 * j)] for j in range(2)]
    trunk = Trunk()
    stem = prompt[4:] + answers[0] + answers[1]

    def run(ids: list[int], at: Tree) -> torch.Tensor:
        with tree.attending(subject.configs, at):
            output = model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=at.positions(),
                use_cache=False,
            )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    try:
        run(prompt[:4], Tree(trunk, 4, (), device, keeps=True))
        trunk.n_tokens = 4
        logits = run(stem, Tree(trunk, len(prompt) - 4, tuple(map(len, answers)), device))
    except Exception as error:  # any model may fail in its own way; the reason is reported
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    at = len(prompt) - 4
    for answer in answers:
        ids = torch.tensor([prompt + answer], device=device)
        own = model(input_ids=ids, use_cache=False).logits[0, len(prompt) :].float()
        ours = logits[at : at + len(answer)]
        apart = float((ours - own).pow(2).mean().sqrt() / own.std().clamp_min(1e-6))
        bound = 1e-3 if subject.dtype == torch.float32 else 0.1
        if not apart < bound:
            return f"logits of a tree differ from the model's own by {apart:.2g} of their spread"
        at += len(answer)
    return None

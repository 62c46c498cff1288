"""Tokens that may stand in another's place."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from trimtab.attribution.problem import Problem
from trimtab.steering.model.decoder import text_config

REPLACERS = ("model", "uniform", "baseline")
# Rows of log-probabilities held at once, each as wide as the vocabulary.
PLACES_A_CALL = 64
_N_DRAWN = 64


class Replacement:
    """Reads the prompt with some tokens replaced.

    Args:
        problem: what is asked.
        replacer: `model` draws each stand-in from the model's own prediction, given what stands
            before; `uniform` from the whole vocabulary; neither draws the token itself or a
            special one. `baseline` takes the token away.
        generator: of the CPU.
    """

    def __init__(self, problem: Problem, replacer: str, generator: torch.Generator) -> None:
        self._problem = problem
        self._generator = generator
        self._drawn: torch.Tensor | None = None  # [n_drawn, n], int64
        if replacer != "baseline":
            self._drawn = torch.cat(list(_drawn(problem, replacer, generator)), dim=1)

    def values(self, away: torch.Tensor) -> torch.Tensor:
        """Return F of each row with its tokens replaced, `[batch]`, float64, on the CPU.

        Args:
            away: `[batch, n]`, bool; True replaces the token.
        """
        problem = self._problem
        if self._drawn is None:
            return problem.values_kept(~away).cpu().double()
        chosen = torch.randint(len(self._drawn), away.shape, generator=self._generator)
        ids = self._drawn.gather(0, chosen)
        others = problem.subject.embeddings(ids.flatten().tolist()).view(*away.shape, -1)
        where = away.to(others.device).unsqueeze(-1)
        return problem.values(torch.where(where, others, problem.inputs)).cpu().double()


def _drawn(problem: Problem, replacer: str, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield stand-ins for the content tokens, `[n_drawn, n]` in slices of places, int64."""
    tokenizer = problem.subject.tokenizer
    vocab = text_config(problem.subject.model).vocab_size
    for start in range(0, problem.n, PLACES_A_CALL):
        places = range(start, min(start + PLACES_A_CALL, problem.n))
        own = [problem.prompt.ids[problem.prompt.content[i]] for i in places]
        chances = torch.ones(len(places), vocab)
        if replacer == "model":
            chances = problem.predictions(places).exp()
        # Rows of the table that the tokenizer does not know were never trained.
        chances[:, len(tokenizer) :] = 0
        chances[:, tokenizer.all_special_ids] = 0
        chances[torch.arange(len(places)), own] = 0
        yield torch.multinomial(chances, _N_DRAWN, replacement=True, generator=generator).T

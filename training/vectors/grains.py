"""Directions from the words that decide between two answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trimtab.attribution.attribute import default_method
from trimtab.attribution.baselines import BASELINES
from trimtab.attribution.methods import registry
from trimtab.attribution.objective import Objective
from trimtab.attribution.problem import Problem
from trimtab.attribution.prompt import Prompt, prompt_from_messages, prompt_from_text
from trimtab.attribution.subject import Subject
from trimtab.steering.errors import DataError, NotFoundError
from trimtab.training.scoring import answer_of
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.masked_prompts import last_states
from trimtab.training.vectors.pairs import Pair

COMPONENTS = ("mean", "pca")
PLACES = ("answer", "prompt")
AUTO, RANDOM = "auto", "random"
_BASELINE = "zero"  # of the attribution, as in the paper; the mask is another matter


@dataclass(frozen=True)
class Grains:
    """What the decisive words of a prompt add to the hidden states of its answers.

    Each prompt's tokens are scored by what they did for the preferred answer against the
    dispreferred one. d+ is what the hidden state loses when the strongest tokens for the preferred
    answer are masked, d- the same for those against it. The direction is d+ over all pairs minus
    d- over all pairs, so it points to the preferred answers.

    Options:
        attribution: how tokens are scored: a method of attribution, `auto` for the one that suits
            the model (AttnLRP where it has rules), or `random`, the control.
        k: at most so many tokens of each sign are masked, and as many of one sign as of the other,
            so that what masking does whatever the token cancels in the difference. A pair whose
            scores all have one sign says nothing and is left out.
        mask: what stands in for a masked token: `pad`, `mean`, `zero` or `drop`.
        component: what is kept of the differences of one sign: their `mean`, or `pca`, the first
            principal component at length 1.
        read: where hidden states are read: `answer`, the mean over the tokens of both answers,
            which attend to the masked tokens themselves, or `prompt`, at its last token.

    Source: GrAInS, arXiv 2507.18043, and duykhuongnguyen/GrAInS@8ad78db src/attribution and
    src/utils/steering.py.

    Differs: answers are scored whole, where the published code takes the last token's probability
    one place too late. Only the prompt's own words are attributed and masked, where the code
    takes template and answers too. Components
    are not centred, which would take away what all pairs share, and turned toward the mean
    difference, where the code leaves the sign to chance. Tokens of the other sign are never taken
    to make up k. Nothing is rescaled here; `normalize` keeps each token's norm, where the code's
    runs over the tokens. On SmolLM2-135M no variant was clearly better than masking random tokens
    (docs/vectors.md).
    """

    attribution: str = AUTO
    k: int = 3
    mask: str = "mean"
    component: str = "pca"
    read: str = "prompt"

    def __post_init__(self) -> None:
        if self.attribution not in (AUTO, RANDOM):
            try:
                registry.make(self.attribution)
            except NotFoundError as error:
                error.param = "params.attribution"
                raise
        if self.k < 1:
            raise DataError(f"Option 'k' is {self.k}; expected 1 or more.", param="params.k")
        for name, known in (
            ("mask", tuple(BASELINES)),
            ("component", COMPONENTS),
            ("read", PLACES),
        ):
            value = getattr(self, name)
            if value not in known:
                raise DataError(
                    f"Option {name!r} is {value!r}; expected one of {', '.join(known)}.",
                    param=f"params.{name}",
                )

    def check(self, pairs: Sequence[Pair]) -> None:
        """Refuse pairs without a prompt, of which there is nothing to attribute.

        Raises:
            DataError: naming the first.
        """
        for pair in pairs:
            if not pair.prompt.strip():
                raise DataError(
                    "Method 'grains' attributes prompts, and the pair whose preferred text begins "
                    f"{pair.preferred[:60]!r} has none. Give pairs with a prompt, or use another "
                    "method."
                )

    def find(
        self,
        host: SteeredModel,
        pairs: Sequence[Pair],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Return directions toward the preferred answers, `[n_layers, d]`, float32.

        Raises:
            DataError: a pair without a prompt, or no prompt with tokens of both signs.
            AttributionError: the attribution or the mask cannot be used on this model.
        """
        self.check(pairs)
        subject = host.subject
        chance = torch.Generator().manual_seed(0)
        differences: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for n, pair in enumerate(pairs):
            prompt = prompt_of(host, pair.prompt)
            if self.attribution == RANDOM:
                scores = torch.randn(len(prompt.content), generator=chance)
            else:
                scores = token_scores(host, subject, pair, self.attribution)
            both = strongest(prompt, scores, self.k)
            if both[0]:
                answers = objective_of(host, pair).answers if self.read == "answer" else ()
                states = self._states(host, prompt, [(), *both], answers)
                for rows, state in zip(differences, states[1:], strict=True):
                    rows.append(states[0] - state)
            if progress is not None:
                progress(n + 1, len(pairs))
        if not differences[0]:
            raise DataError(
                "In no prompt is there both a token that speaks for the preferred answer and one "
                "that speaks against it; longer prompts have more tokens to tell apart."
            )
        toward, away = (component_of(torch.stack(rows), self.component) for rows in differences)
        return toward - away

    def _states(
        self,
        host: SteeredModel,
        prompt: Prompt,
        masked: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        n_tokens = len(prompt.tokens) + sum(map(len, answers))
        n_rows = host.rows_at_once(n_tokens, most=len(masked))
        groups = [masked[at : at + n_rows] for at in range(0, len(masked), n_rows)]
        found = [
            last_states(
                host.subject,
                prompt,
                group,
                mask=self.mask,
                answers=answers,
                slices=host.slices,
            )
            for group in groups
        ]
        return torch.cat(found)


def prompt_of(host: SteeredModel, text: str) -> Prompt:
    """Return a pair's prompt as the model reads it, in its chat template if it has one."""
    if getattr(host.tokenizer, "chat_template", None):
        return prompt_from_messages(host.tokenizer, [{"role": "user", "content": text}])
    return prompt_from_text(host.tokenizer, text)


def objective_of(host: SteeredModel, pair: Pair) -> Objective:
    """Return log P of the preferred answer minus log P of the other, whole with their end marks."""
    preferred, dispreferred = (
        answer.ids[answer.n_prompt :]
        for answer in (
            answer_of(host.tokenizer, pair.prompt, text)
            for text in (pair.preferred, pair.dispreferred)
        )
    )
    return Objective(preferred, dispreferred)


def token_scores(host: SteeredModel, subject: Subject, pair: Pair, method: str) -> torch.Tensor:
    """Return what each content token of the prompt did for the preferred answer.

    Args:
        host: the model.
        subject: the same model, ready to be asked.
        pair: prompt and answers, scored whole with their end mark.
        method: name of an attribution method, or `auto`.

    Returns:
        `[n_content]`, float32, nats.
    """
    preferred, dispreferred = (
        answer_of(host.tokenizer, pair.prompt, text) for text in (pair.preferred, pair.dispreferred)
    )
    objective = Objective(
        preferred.ids[preferred.n_prompt :], dispreferred.ids[dispreferred.n_prompt :]
    )
    how = registry.make(default_method(subject) if method == AUTO else method)
    problem = Problem(
        subject,
        prompt_of(host, pair.prompt),
        objective,
        baseline=_BASELINE,
        slices=host.slices,
    )
    return how.explain(problem).values.cpu()


def strongest(prompt: Prompt, scores: torch.Tensor, k: int) -> tuple[list[int], list[int]]:
    """Return the prompt tokens with the largest positive and the largest negative scores.

    Args:
        prompt: the prompt.
        scores: one a content token, `[n_content]`; a zero speaks for neither.
        k: at most so many of each sign, and as many of one as of the other.

    Returns:
        Numbers of prompt tokens, strongest first.
    """
    order = scores.argsort(stable=True).tolist()
    positive = [i for i in reversed(order) if scores[i] > 0]
    negative = [i for i in order if scores[i] < 0]
    n = min(k, len(positive), len(negative))
    content = prompt.content
    return [content[i] for i in positive[:n]], [content[i] for i in negative[:n]]


def component_of(differences: torch.Tensor, kind: str) -> torch.Tensor:
    """Return what differences have in common, `[n_layers, d]`, float32.

    Args:
        differences: `[n, n_layers, d]`, float32.
        kind: `mean`, or `pca` for the first principal component about zero: of length 1, turned
            so that the differences' mean projection on it is positive.
    """
    mean = differences.mean(0)
    if kind == "mean":
        return mean
    found = torch.stack(
        [torch.linalg.svd(x.double(), full_matrices=False).Vh[0] for x in differences.unbind(1)]
    ).float()
    toward = (mean * found).sum(1, keepdim=True)
    return torch.where(toward < 0, -found, found)

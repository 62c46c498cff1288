"""How a request's tokens are chosen: the engine-independent parameters, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one sequence.

    Attributes:
        max_tokens: most tokens to generate; 0 only together with `prompt_logprobs` (scoring).
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probability reaches this, (0, 1].
        top_k: keep the k most likely; 0 keeps all.
        min_p: drop tokens below this share of the most likely one's probability, [0, 1].
        seed: seed of the request's own generator; None draws one.
        presence_penalty, frequency_penalty: OpenAI's, [-2, 2], over generated tokens only.
        repetition_penalty: CTRL's (arXiv 1909.05858), over prompt and generated tokens; 1 is off.
        logit_bias: token id -> value added to its logit before sampling.
        stop: strings that end the text; the text ends before them.
        stop_token_ids: ids that end the text besides the model's own end tokens.
        ignore_eos: go on past the model's end tokens.
        logprobs: number of top alternatives to report with each token; None reports none.
        prompt_logprobs: the same for the prompt's tokens; None reports none.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def needs_history(self) -> bool:
        """True if choosing a token depends on the tokens before it beyond the model."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

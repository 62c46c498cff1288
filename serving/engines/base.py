"""The contract every engine keeps, and what passes between an engine and the HTTP app."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from trimtab.attribution.slices import Slices
from trimtab.attribution.subject import Subject
from trimtab.serving.sampling import SamplingParams
from trimtab.steering.artifact import ModelRef
from trimtab.steering.errors import TrimtabError
from trimtab.steering.model.loading import LoadedModel
from trimtab.steering.plan import Plan, ProbeRow, Reader


class OverloadedError(TrimtabError):
    """The queue is full. `retry_after_s` is when to try again."""

    status = 429
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ContextLengthError(TrimtabError):
    """Prompt and answer do not fit into the model's context."""

    code = "context_length_exceeded"


class EngineError(TrimtabError):
    """The engine failed on a request through no fault of the client's."""

    status = 500
    code = "engine_error"


class FinishReason(enum.StrEnum):
    """Why a sequence ended, in OpenAI's words; `cancelled` and `error` never reach a client."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class Logprob:
    """One token's log-probability: id, its text decoded alone, natural log, rank from 1."""

    token_id: int
    token: str
    logprob: float
    rank: int


@dataclass(frozen=True)
class TokenLogprobs:
    """The chosen token's log-probability and the most likely alternatives, best first."""

    chosen: Logprob
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Request:
    """One sequence to generate. `n` choices are n requests.

    Attributes:
        id: unique among live requests.
        prompt_ids: the whole prompt, at least one token.
        sampling: how to choose tokens.
        plan: compiled steering, or None.
        probes: what to read at every generated token.
        cache_salt: cached prompts are shared only with requests that have the same.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    plan: Plan | None = None
    probes: tuple[Reader, ...] = ()
    cache_salt: str | None = None


@dataclass(frozen=True)
class Delta:
    """What one step adds to a sequence.

    Attributes:
        text: new text, complete characters only; may be empty.
        token_ids: new tokens, in order.
        logprobs: one entry a new token if asked for.
        prompt_logprobs: on the first delta only, if asked for: one entry a prompt token, the
            first None (nothing predicts it).
        probes: one entry a new token if the request has probes: for each probe its labels'
            probabilities in the state the token was chosen from.
        finish_reason: set on the last delta.
        steering: on the last delta of a steered request, the runtime half of its receipt:
            `{"steered_tokens": int, "gates": [{"probe", "layer", "fired": share or bool}]}`.
        cached_tokens: on the first delta, prompt tokens whose KV was reused.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    probes: tuple[ProbeRow, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    steering: dict[str, Any] | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class EngineInfo:
    """Facts the app needs about an engine, fixed once it is ready.

    Attributes:
        model: identity of the served model.
        tokenizer: its Hugging Face tokenizer.
        hidden_norms: typical |h| at each layer, `[n_layers]`, float32.
        max_context: most tokens of prompt plus answer.
        has_thinking: whether thinking spans are marked by tokens.
        choices: what was chosen and why, name -> sentence (device, dtype, batching ...).
    """

    model: ModelRef
    tokenizer: Any
    hidden_norms: torch.Tensor
    max_context: int
    has_thinking: bool
    choices: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineStats:
    """A momentary view for /metrics and /health."""

    running: int
    waiting: int
    slots_used: int
    slots_total: int
    steps: int


@dataclass(frozen=True)
class ModelAccess:
    """The served model in this process, for attribution and for building.

    Attributes:
        loaded: the model. Only slices may run it.
        subject: the same, as attribution asks it; knows its profile.
        slices: runs a bounded piece of work on the model's thread, between two steps of the
            batch; blocks the caller, which must not be the event loop.
    """

    loaded: LoadedModel
    subject: Subject
    slices: Slices


class Engine(Protocol):
    """Generates tokens for many requests at once, each steered its own way."""

    @property
    def info(self) -> EngineInfo:
        """Facts about the model; valid once `start` has returned."""
        ...

    async def start(self) -> None:
        """Load the model and be ready to generate. Called once."""
        ...

    def check(self, request: Request) -> None:
        """Refuse a request that could never run, before any work.

        Raises:
            ContextLengthError: prompt plus max_tokens exceed the context.
            SpecError: the plan can never fit the bank.
        """
        ...

    def generate(self, *requests: Request) -> list[AsyncIterator[Delta]]:
        """Queue requests together, all or none; iterate each for its deltas.

        Leaving an iterator early (aclose, task cancelled) cancels that request and frees its
        place. An iterator raises EngineError if the engine failed on that request alone.

        Raises:
            OverloadedError: the queue has no room for all of them.
        """
        ...

    @property
    def model_access(self) -> ModelAccess | None:
        """The model in this process; None for an engine that has it elsewhere."""
        ...

    @property
    def is_alive(self) -> bool:
        """False once it has died and can answer nothing until the server is started anew."""
        ...

    def stats(self) -> EngineStats:
        """Return the load now."""
        ...

    async def stop(self) -> None:
        """Cancel what runs and free the model. Safe to call twice."""
        ...

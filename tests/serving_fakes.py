"""A fake engine that keeps the contract exactly, with the tokenizer and vectors that go with it."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab.serving.engines.base import (
    ContextLengthError,
    Delta,
    EngineInfo,
    EngineStats,
    FinishReason,
    Logprob,
    OverloadedError,
    Request,
    TokenLogprobs,
)
from trimtab.steering.artifact import ModelRef
from trimtab.steering.plan import ProbeRow
from trimtab.steering.vector import VectorArtifact

WIDTH, LAYERS, CONTEXT = 32, 2, 256
CHATML = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, four special tokens, the ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i + 4 for i, char in enumerate(alphabet)}
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE(vocab | {s: i for i, s in enumerate(specials)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[2:],
        chat_template=CHATML,
    )


TOKENIZER = byte_tokenizer()
LETTERS = TOKENIZER("abcdefgh ijklmnop", add_special_tokens=False)["input_ids"]


class FakeStream:
    """A sequence of the fake engine's, cancelled by aclose even if nobody ever iterated it."""

    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self.engine, self.request = engine, request
        self.deltas = engine.script(request)
        engine.live[request.id] = request

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> Delta:
        try:
            await asyncio.sleep(self.engine.delay_s)
            delta = next(self.deltas)
        except StopIteration:
            raise StopAsyncIteration from None
        except asyncio.CancelledError:
            await self.aclose()
            raise
        except BaseException:
            self.engine.live.pop(self.request.id, None)
            raise
        if delta.finish_reason is not None:
            self.engine.live.pop(self.request.id, None)
        return delta

    async def aclose(self) -> None:
        if self.engine.live.pop(self.request.id, None) is not None:
            self.engine.cancelled.append(self.request.id)


@dataclass
class FakeEngine:
    """Tokens drawn from a hash of prompt, seed and plan; everything else as the contract says."""

    delay_s: float = 0.0
    room: int = 64
    tokenizer: Any = TOKENIZER
    fail_at: int | None = None
    forget_receipt: bool = False
    start_error: Exception | None = None
    may_start: threading.Event = field(default_factory=threading.Event)
    live: dict[str, Request] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    seen: list[Request] = field(default_factory=list)
    is_stopped: bool = False
    is_alive: bool = True

    def __post_init__(self) -> None:
        self.may_start.set()

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model=model_ref(),
            tokenizer=self.tokenizer,
            hidden_norms=torch.ones(LAYERS),
            max_context=CONTEXT,
            has_thinking=False,
        )

    async def start(self) -> None:
        while not self.may_start.is_set():
            await asyncio.sleep(0.005)
        if self.start_error is not None:
            raise self.start_error

    def check(self, request: Request) -> None:
        n = len(request.prompt_ids)
        if n + max(request.sampling.max_tokens, 1) > CONTEXT:
            raise ContextLengthError(f"{n} tokens are too many.", param="messages")

    def generate(self, *requests: Request) -> list[AsyncIterator[Delta]]:
        if len(self.live) + len(requests) > self.room:
            raise OverloadedError("The queue is full.", retry_after_s=3)
        self.seen.extend(requests)
        return [FakeStream(self, request) for request in requests]

    @property
    def model_access(self) -> None:
        return None

    def stats(self) -> EngineStats:
        return EngineStats(len(self.live), 0, 0, 8, len(self.seen))

    async def stop(self) -> None:
        self.is_stopped = True
        self.live.clear()

    def script(self, request: Request) -> Iterator[Delta]:
        s, plan = request.sampling, request.plan
        seed = s.seed if s.temperature else 0
        key = repr((request.prompt_ids, seed, (plan and plan.parts and plan.fingerprint) or None))
        prompt = None
        if s.prompt_logprobs is not None:
            rest = [fake_logprobs(t, s.prompt_logprobs) for t in request.prompt_ids[1:]]
            prompt = (None, *rest)
        text, ids, done = "", [], ""
        for step in range(s.max_tokens):
            if step == self.fail_at:
                raise RuntimeError("secret insides")
            draw = hashlib.sha256(f"{key}{step}".encode()).digest()[0]
            token = LETTERS[draw % len(LETTERS)]
            ids.append(token)
            done = TOKENIZER.decode(ids)
            hit = next((x for x in s.stop if x in done), None)
            shown = done if hit is None else done[: done.index(hit)]
            reason, why = None, None
            if hit is not None or token in s.stop_token_ids:
                reason, why = FinishReason.STOP, hit or token
            elif step == s.max_tokens - 1:
                reason = FinishReason.LENGTH
            # Hold back what may become a stop string, as real engines do.
            held = 0 if reason else max((len(x) - 1 for x in s.stop), default=0)
            upto = max(len(text), len(shown) - held) if reason is None else len(shown)
            new, text = shown[len(text) : upto], shown[: max(upto, len(text))]
            yield Delta(
                text=new,
                token_ids=(token,),
                logprobs=() if s.logprobs is None else (fake_logprobs(token, s.logprobs),),
                prompt_logprobs=prompt if step == 0 else None,
                probes=(fake_readings(request),) if request.probes else (),
                finish_reason=reason,
                stop_reason=why,
                steering=self.receipt(request, step + 1) if reason else None,
            )
            if reason:
                return
        yield Delta(
            prompt_logprobs=prompt,
            finish_reason=FinishReason.LENGTH,
            steering=self.receipt(request, 0),
        )

    def receipt(self, request: Request, made: int) -> dict[str, Any] | None:
        if request.plan is None or self.forget_receipt:
            return None
        if not request.plan.parts:
            return {"steered_tokens": 0, "gates": []}
        return {"steered_tokens": len(request.prompt_ids) + max(made - 1, 0), "gates": []}


def fake_logprobs(token: int, top: int) -> TokenLogprobs:
    first = Logprob(token, TOKENIZER.decode([token]), -0.5, 1)
    others = [Logprob(t, TOKENIZER.decode([t]), -1.0 - t, 2 + i) for i, t in enumerate(LETTERS)]
    return TokenLogprobs(first, tuple([first, *others][:top]))


def model_ref(**changes: Any) -> ModelRef:
    return replace(ModelRef("toy/model", "f" * 64, "llama", WIDTH, LAYERS), **changes)


def toy_vector(
    name: str,
    *,
    ref: ModelRef | None = None,
    size: float = 0.2,
    seed: int = 0,
    layers: tuple[int, ...] = tuple(range(LAYERS)),
) -> VectorArtifact:
    """A vector of length `size` at each layer; with the fake engine that is its dose."""
    ref = ref or model_ref()
    rows = torch.randn(len(layers), ref.hidden_size, generator=torch.Generator().manual_seed(seed))
    return VectorArtifact(
        id=name,
        model=ref,
        layers=layers,
        directions=size * rows / rows.norm(dim=1, keepdim=True),
        default_layers=layers[-1:],
        method="caa",
    )


def fake_readings(request: Request) -> ProbeRow:
    """The same probability for every label."""
    return tuple((0.5,) * len(reader.labels) for reader in request.probes)

"""Laws of the embedded engine: what a request gets never depends on its neighbours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest
import torch
from toy_chat import toy_chat
from toys import TOYS

from trimtab.serving.engines.base import (
    ContextLengthError,
    Delta,
    EngineError,
    FinishReason,
    OverloadedError,
    Request,
)
from trimtab.serving.engines.transformers.engine import EngineConfig, TransformersEngine
from trimtab.serving.engines.transformers.kv import KVRows
from trimtab.serving.engines.transformers.runner import (
    Chunk,
    PackedRunner,
    SoloRunner,
    packing_problem,
)
from trimtab.serving.sampling import SamplingParams
from trimtab.steering.bank import Bank
from trimtab.steering.errors import SpecError
from trimtab.steering.model.loading import LoadedModel
from trimtab.steering.model.profile import profile_model
from trimtab.steering.plan import Plan, additive_plan
from trimtab.steering.steered_request import SteeredRequest
from trimtab.steering.step import Span

PACKED = {"gemma3", "gemma3_multimodal", "gpt2", "llama", "mixtral", "qwen3", "qwen3_moe"}


def plan(i: int, *, width: int = 32, layer: int = 0, size: float = 4.0) -> Plan:
    row = torch.randn(width, generator=torch.Generator().manual_seed(100 + i))
    return additive_plan({layer: row / row.norm() * size}, normalize=bool(i % 2))


def prompt(i: int, n: int = 12) -> tuple[int, ...]:
    return tuple((7 * i + 3 * j) % 100 for j in range(n + i % 5))


def greedy(n: int = 12, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True, **more)


async def drain(stream: AsyncIterator[Delta]) -> tuple[list[int], Delta]:
    tokens: list[int] = []
    last = Delta()
    async for delta in stream:
        tokens += delta.token_ids
        last = delta
    return tokens, last


def on_engine(
    use: Callable[[TransformersEngine], Awaitable[Any]],
    *,
    loaded: LoadedModel | None = None,
    **config: Any,
) -> Any:
    """Run a coroutine on a started engine and stop it after."""

    async def go() -> Any:
        model = loaded or toy_chat()
        engine = TransformersEngine(lambda: model, config=EngineConfig(**config))
        await engine.start()
        try:
            result = await use(engine)
            assert not hooks_of(model.model), "a hook was left behind"
            return result
        finally:
            await engine.stop()

    return asyncio.run(go())


def hooks_of(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module._forward_hooks]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def test_sixteen_plans_at_once_equal_their_solo_runs():
    """Catches a token steered by a neighbour's slot, row or position."""

    async def use(engine: TransformersEngine) -> None:
        requests = [Request(f"r{i}", prompt(i), greedy(), plan(i)) for i in range(16)]
        solo = []
        for request in requests:
            solo.append(await drain(engine.generate(request)[0]))
        together = await asyncio.gather(*map(drain, engine.generate(*requests)))
        assert [tokens for tokens, _ in together] == [tokens for tokens, _ in solo]
        plain, _ = await drain(engine.generate(Request("p", prompt(0), greedy()))[0])
        assert plain != solo[0][0], "the plan must matter for the test to mean anything"
        assert engine.stats().slots_used == 0

    on_engine(use)


@pytest.mark.slow
def test_sixteen_plans_at_once_on_the_real_model(smollm2):
    """Catches the same on real weights, in float32, over all layers."""
    norms = profile_model(
        smollm2.model, model_id="smollm2", tokenizer=smollm2.tokenizer
    ).hidden_norms

    def real_plan(i: int) -> Plan:
        row = torch.randn(576, generator=torch.Generator().manual_seed(i))
        layers = range(i, min(i + 4, 30))
        return additive_plan({n: row / row.norm() * 0.2 * float(norms[n]) for n in layers})

    async def use(engine: TransformersEngine) -> None:
        texts = [f"Tell me about the number {i}." for i in range(16)]
        ids = [tuple(smollm2.tokenizer(t)["input_ids"]) for t in texts]
        requests = [Request(f"r{i}", ids[i], greedy(8), real_plan(i)) for i in range(16)]
        solo = []
        for request in requests:
            solo.append((await drain(engine.generate(request)[0]))[0])
        together = await asyncio.gather(*map(drain, engine.generate(*requests)))
        assert [tokens for tokens, _ in together] == solo

    on_engine(use, loaded=smollm2)


@pytest.mark.parametrize("name", sorted(TOYS))
def test_every_architecture_serves_the_models_own_greedy_tokens(name):
    """Catches wrong positions, masks, windows or caches for any kind of model."""
    loaded = toy_chat(TOYS[name]())
    asked = [prompt(i, 30) for i in range(3)]
    with torch.inference_mode():
        own = []
        for ids in asked:
            sequence = list(ids)
            for _ in range(8):
                logits = loaded.model(input_ids=torch.tensor([sequence])).logits[0, -1]
                sequence.append(int(logits.argmax()))
            own.append(sequence[len(ids) :])

    async def use(engine: TransformersEngine) -> list[list[int]]:
        requests = [Request(f"r{i}", ids, greedy(8)) for i, ids in enumerate(asked)]
        served = await asyncio.gather(*map(drain, engine.generate(*requests)))
        packed = engine.info.choices["batching"].startswith("packed")
        assert packed == (name in PACKED), engine.info.choices["batching"]
        return [tokens for tokens, _ in served]

    assert on_engine(use, loaded=loaded) == own


def runner_of(n_rows: int = 4) -> tuple[PackedRunner, Bank]:
    loaded = toy_chat()
    profile = profile_model(loaded.model, model_id="toy")
    bank = Bank(n_layers=2, hidden_size=32)
    kv = KVRows(n_rows=n_rows, max_tokens=256)
    return PackedRunner(loaded.model, profile.layers, bank=bank, kv=kv), bank


def steered_span(bank: Bank, p: Plan, n: int, *, start: int = 0, n_prompt: int) -> Span:
    lease = bank.acquire(p)
    assert lease is not None
    return Span(n, start, SteeredRequest(lease, n_prompt))


@torch.inference_mode()
def test_neighbours_of_a_steered_request_are_bit_identical():
    """Catches any write outside the steered request's own tokens."""
    results = []
    for size in (0.0, 4.0):
        runner, bank = runner_of()
        spans = [Span(9), steered_span(bank, plan(1, size=size or 1e-9), 9, n_prompt=9), Span(9)]
        ids = [prompt(i, 9)[:9] for i in range(3)]
        first = runner.run([Chunk(i, ids[i], 0, spans[i], 9) for i in range(3)])
        then = [Span(1, 9), Span(1, 9, spans[1].request), Span(1, 9)]
        second = runner.run([Chunk(i, [5], 9, then[i], 1) for i in range(3)])
        results.append((first, second))
    (quiet, quiet_next), (steered, steered_next) = results
    for i in (0, 2):
        assert torch.equal(quiet[i], steered[i])
        assert torch.equal(quiet_next[i], steered_next[i])
    assert not torch.allclose(quiet[1], steered[1], atol=1e-2)


@torch.inference_mode()
def test_neighbours_agree_when_the_batch_shape_differs():
    """Catches leaks that only show when a request joins or leaves: 1e-4 on logits in fp32."""
    runner, bank = runner_of()
    ids = prompt(3, 20)
    (alone,) = runner.run([Chunk(0, ids, 0, Span(len(ids)), len(ids))])
    other = prompt(4, 31)
    crowd = [
        Chunk(1, other, 0, steered_span(bank, plan(1), len(other), n_prompt=len(other)), 1),
        Chunk(0, ids, 0, Span(len(ids)), len(ids)),
    ]
    assert torch.allclose(alone, runner.run(crowd)[1], atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("cuts", [(1,), (5, 9), (1, 2, 3), (17,)])
def test_chunked_prefill_and_decoding_equal_one_pass(cuts):
    """Catches wrong masks or positions at a chunk's edge, steered or not."""
    ids = prompt(2, 18)
    n = len(ids)
    runner, bank = runner_of()
    (whole,) = runner.run([Chunk(0, ids, 0, steered_span(bank, plan(3), n, n_prompt=n), n)])
    request = steered_span(bank, plan(3), n, n_prompt=n).request
    pieces = []
    for start, stop in zip((0, *cuts), (*cuts, n), strict=True):
        span = Span(stop - start, start, request)
        pieces += runner.run([Chunk(1, ids[start:stop], start, span, stop - start)])
    assert torch.allclose(whole, torch.cat(pieces), atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "mamba", "jamba", "qwen3_next", "lfm2"])
def test_the_solo_runner_steers_prefill_and_decoding_like_one_pass(name):
    """Catches a state-space cache that misses the steered states, or is rebuilt unsteered."""
    model = TOYS[name]()
    profile = profile_model(model, model_id="toy")
    bank = Bank(n_layers=len(profile.layers), hidden_size=32)
    runner = SoloRunner(model, profile.layers, bank=bank)
    ids = prompt(1, 10)
    n = len(ids)
    (whole,) = runner.run([Chunk(0, ids, 0, steered_span(bank, plan(1), n, n_prompt=n), n)])
    request = steered_span(bank, plan(1), n, n_prompt=n).request
    rows = runner.run([Chunk(1, ids[:-2], 0, Span(n - 2, 0, request), n - 2)])
    for at in (n - 2, n - 1):
        rows += runner.run([Chunk(1, ids[at : at + 1], at, Span(1, at, request), 1)])
    assert torch.allclose(whole, torch.cat(rows), atol=1e-4)


def test_a_model_that_packs_wrongly_is_noticed():
    """Catches a self-check that cannot fail: Mamba's state would mix the sequences."""
    model = TOYS["mamba"]()
    profile = profile_model(model, model_id="toy")
    kv = KVRows(n_rows=2, max_tokens=64)
    bank = Bank(n_layers=2, hidden_size=32)
    assert packing_problem(PackedRunner(model, profile.layers, bank=bank, kv=kv)) is not None


def test_rows_close_up_when_sequences_leave_in_any_order():
    """Catches a moved row that loses its keys, values or steering."""

    async def use(engine: TransformersEngine) -> None:
        lengths = [3, 20, 5, 14, 1, 9, 30, 2]
        requests = [
            Request(f"r{i}", prompt(i), greedy(n), plan(i) if i % 3 else None)
            for i, n in enumerate(lengths)
        ]
        solo = [(await drain(engine.generate(r)[0]))[0] for r in requests]
        streams = engine.generate(*requests)
        assert [t for t, _ in await asyncio.gather(*map(drain, streams))] == solo

    on_engine(use, max_concurrent=4)


def test_leaving_a_stream_frees_its_place_and_slot():
    """Catches a cancelled request that goes on computing or keeps its slot."""

    async def use(engine: TransformersEngine) -> None:
        long = Request("long", prompt(0), greedy(400), plan(0))
        other = Request("other", prompt(1), greedy(20), plan(1))
        expected, _ = await drain(engine.generate(other)[0])
        (leaving,), (staying,) = engine.generate(long), engine.generate(other)
        async for _ in leaving:
            break
        await leaving.aclose()  # type: ignore[attr-defined]
        tokens, _ = await drain(staying)
        assert tokens == expected
        await until(lambda: engine.stats().running == 0 and engine.stats().slots_used == 0)

    on_engine(use)


def test_a_cancelled_task_cancels_its_request():
    """Catches a disconnect that leaves the request running."""

    async def use(engine: TransformersEngine) -> None:
        (stream,) = engine.generate(Request("r", prompt(0), greedy(400)))
        task: asyncio.Task[Any] = asyncio.ensure_future(_coroutine(drain(stream)))
        await until(lambda: engine.stats().running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.stats().running == 0)

    on_engine(use)


async def _coroutine(work: Coroutine[Any, Any, Any]) -> Any:
    return await work


def test_a_request_that_breaks_the_step_fails_alone(monkeypatch):
    """Catches one request's exception ending, or unsteering, its batch-mates."""
    bad = prompt(9)

    async def use(engine: TransformersEngine) -> None:
        good = [Request(f"g{i}", prompt(i), greedy(), plan(i)) for i in range(3)]
        expected = [(await drain(engine.generate(r)[0]))[0] for r in good]
        assert engine._batcher is not None
        run = engine._batcher.runner.run

        def failing(chunks: Any) -> Any:
            if any(tuple(c.ids) == bad for c in chunks):
                raise RuntimeError("planted")
            return run(chunks)

        monkeypatch.setattr(engine._batcher.runner, "run", failing)
        streams = engine.generate(*good[:2], Request("bad", bad, greedy(), plan(9)), good[2])
        results = await asyncio.gather(*map(drain, streams), return_exceptions=True)
        assert isinstance(results[2], EngineError)
        assert "planted" in str(results[2])
        assert [r[0] for r in (*results[:2], results[3])] == expected  # type: ignore[index]
        assert engine.stats().slots_used == 0

    on_engine(use)


def test_a_full_queue_refuses_all_or_none():
    """Catches an unbounded queue, and half a group being admitted."""

    async def use(engine: TransformersEngine) -> None:
        first = engine.generate(*(Request(f"a{i}", prompt(i), greedy(300)) for i in range(3)))
        with pytest.raises(OverloadedError) as refused:
            engine.generate(*(Request(f"b{i}", prompt(i), greedy(2)) for i in range(2)))
        assert refused.value.retry_after_s >= 1
        (one,) = engine.generate(Request("c", prompt(0), greedy(2)))
        for stream in first:
            await stream.aclose()  # type: ignore[attr-defined]
        assert len((await drain(one))[0]) == 2

    on_engine(use, max_concurrent=2, max_queue=2)


def test_a_request_without_a_slot_waits_and_is_then_steered():
    """Catches serving unsteered when the bank is full: the worst bug there is."""

    async def use(engine: TransformersEngine) -> None:
        requests = [Request(f"r{i}", prompt(i), greedy(), plan(i)) for i in range(6)]
        solo = [(await drain(engine.generate(r)[0]))[0] for r in requests]
        together = await asyncio.gather(*map(drain, engine.generate(*requests)))
        assert [t for t, _ in together] == solo
        for _, last in together:
            assert last.steering is not None
            assert last.steering["steered_tokens"] > 12

    on_engine(use, max_slots=2)


def test_what_can_never_fit_is_refused_at_once():
    """Catches a request that would wait for ever, or overrun the cache."""

    async def use(engine: TransformersEngine) -> None:
        with pytest.raises(ContextLengthError):
            engine.generate(Request("r", prompt(0), greedy(10_000)))
        assert engine.bank is not None
        engine.bank.max_rows = 1
        rows = {0: torch.ones(32), 1: torch.ones(32)}
        with pytest.raises(SpecError):
            engine.generate(Request("r", prompt(0), greedy(2), additive_plan(rows)))

    on_engine(use)


def test_the_context_can_be_filled_to_the_last_token():
    """Catches an off-by-one between prompt, answer and cache."""

    async def use(engine: TransformersEngine) -> None:
        most = engine.info.max_context
        ids = tuple(i % 90 for i in range(most - 5))
        tokens, last = await drain(engine.generate(Request("r", ids, greedy(5)))[0])
        assert len(tokens) == 5
        assert last.finish_reason is FinishReason.LENGTH

    on_engine(use)


def test_prompt_logprobs_equal_a_plain_forward():
    """Catches scores shifted by one, or lost at the edge of a prefill chunk."""
    loaded = toy_chat()
    ids = tuple((5 * i) % 120 for i in range(300))
    with torch.inference_mode():
        logprobs = loaded.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    own = [float(logprobs[i - 1, ids[i]]) for i in range(1, len(ids))]

    async def use(engine: TransformersEngine) -> None:
        sampling = SamplingParams(max_tokens=0, prompt_logprobs=2)
        busy = engine.generate(Request("busy", prompt(0), greedy(60)))[0]
        (stream,) = engine.generate(Request("r", ids, sampling))
        deltas = [delta async for delta in stream]
        await drain(busy)
        assert len(deltas) == 1
        assert deltas[0].token_ids == ()
        scored = deltas[0].prompt_logprobs
        assert scored is not None
        assert scored[0] is None
        assert len(scored) == len(ids)
        assert [s.chosen.logprob for s in scored[1:] if s] == pytest.approx(own, abs=1e-4)
        assert [s.chosen.token_id for s in scored[1:] if s] == list(ids[1:])

    on_engine(use, loaded=loaded)


def test_an_end_token_stops_and_is_not_shown():
    """Catches running past the end token, or its text leaking out."""
    loaded = toy_chat()
    end = loaded.tokenizer.eos_token_id

    async def use(engine: TransformersEngine) -> None:
        forced = SamplingParams(max_tokens=5, temperature=0.0, logit_bias={end: 100.0})
        tokens, last = await drain(engine.generate(Request("r", prompt(0), forced))[0])
        assert tokens == [end]
        assert last.finish_reason is FinishReason.STOP
        assert last.text == ""

    on_engine(use, loaded=loaded)


def test_logits_that_are_not_finite_end_the_request_with_an_error():
    """Catches NaN turned into fluent-looking tokens."""

    async def use(engine: TransformersEngine) -> None:
        broken = additive_plan({0: torch.full((32,), float("nan"))})
        good = Request("good", prompt(1), greedy(), plan(1))
        expected, _ = await drain(engine.generate(good)[0])
        streams = engine.generate(Request("bad", prompt(0), greedy(), broken), good)
        bad, fine = await asyncio.gather(*map(drain, streams), return_exceptions=True)
        assert isinstance(bad, EngineError)
        assert fine[0] == expected  # type: ignore[index]

    on_engine(use)


def test_stopping_ends_what_runs():
    """Catches a stop that hangs on, or forgets, running requests."""

    async def go() -> None:
        engine = TransformersEngine(toy_chat, config=EngineConfig())
        await engine.start()
        (stream,) = engine.generate(Request("r", prompt(0), greedy(400)))
        await until(lambda: engine.stats().running == 1)
        await engine.stop()
        _, last = await drain(stream)
        assert last.finish_reason is FinishReason.CANCELLED
        await engine.stop()

    asyncio.run(go())


def test_a_model_that_cannot_load_fails_the_start():
    """Catches an engine that reports ready without a model."""

    def broken() -> LoadedModel:
        raise OSError("no such weights")

    with pytest.raises(OSError, match="no such weights"):
        asyncio.run(TransformersEngine(broken).start())


@torch.inference_mode()
def test_a_broken_sequence_leaves_no_nan_for_its_neighbours():
    """Catches NaN in a cache row reaching a shorter neighbour: weight 0 times NaN is NaN."""
    runner, bank = runner_of(n_rows=2)
    ids = prompt(1, 30)
    n = len(ids)
    broken = steered_span(bank, additive_plan({0: torch.full((32,), torch.nan)}), n, n_prompt=n)
    runner.run([Chunk(1, ids, 0, broken, 1)])
    runner.free(1, n, is_broken=True)
    long, short = prompt(2, 40), prompt(3, 4)
    runner.run([Chunk(0, long, 0, Span(len(long)), 1), Chunk(1, short, 0, Span(len(short)), 1)])
    first, second = runner.run(
        [
            Chunk(0, [5], len(long), Span(1, len(long)), 1),
            Chunk(1, [5], len(short), Span(1, len(short)), 1),
        ]
    )
    assert first.isfinite().all()
    assert second.isfinite().all()


def test_the_cache_starts_clean():
    """Catches a cache of uninitialised memory, where a masked key may be NaN."""
    kv = KVRows(n_rows=3, max_tokens=7)
    for layer, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        like = torch.ones(1, 2, 1, 4, dtype=dtype)
        keys, values = kv.layer(layer, like, like)
        assert keys.shape == (3, 2, 7, 4)
        assert keys.dtype == dtype
        assert not keys.any()
        assert not values.any()

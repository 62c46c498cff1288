"""The vLLM engine gives the transformers engine's numbers, whatever its scheduler does.

Everything here goes through `VllmEngine` with the real model in float32. The reference is the
transformers model with the steering step's own hooks, whose laws have tests of their own, run
over the whole sequence at once: no chunks, no cache, no batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from serving_fakes import toy_vector
from toy_classifier import toy_classifier

from trimtab.serving.engines.base import Delta, EngineError, Request
from trimtab.serving.engines.vllm.engine import VllmConfig, VllmEngine
from trimtab.serving.sampling import SamplingParams
from trimtab.steering.bank import Bank
from trimtab.steering.compile import Limits, compile_plan
from trimtab.steering.model.hooks import steered
from trimtab.steering.model.loading import LoadedModel
from trimtab.steering.model.profile import ModelProfile, profile_model
from trimtab.steering.plan import Plan
from trimtab.steering.spec import parse_spec
from trimtab.steering.steered_request import SteeredRequest
from trimtab.steering.step import Span, SteerStep
from trimtab.steering.store import Store

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BOUND = 1e-3  # largest difference of a logit; they are up to 36
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "block_size": 32,
    "logprobs_mode": "raw_logits",
}
# Prompts in pieces of at most 64 tokens, and a cache that cannot hold eight sequences.
CRAMPED = {"enforce_eager": True, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 24}

SPECS: dict[str, dict[str, Any]] = {
    "one layer": {"vectors": [{"id": "kind", "scale": 1.5}]},
    "all layers, norms kept": {
        "vectors": [
            {"id": "kind", "layers": list(range(30)), "scale": 0.2, "normalize": True},
            {"id": "formal", "layers": list(range(30)), "scale": -0.2, "normalize": True},
        ]
    },
    "answer only": {"vectors": [{"id": "formal", "apply": {"prompt": False}, "scale": 2.0}]},
    "some of the answer": {"vectors": [{"id": "kind", "apply": {"first": 8, "after": 2}}]},
    "ablation": {"ablate": [{"id": "formal"}]},
    "guidance": {"guidance": [{"classifier": "tone", "target": ["expert"], "steps": 3}]},
    "gated": {
        "vectors": [{"id": "kind", "scale": 2.0}],
        "when": {"probe": "tone/casual", "above": 0.3},
    },
}


@dataclass
class Bench:
    """A running engine, a store for its model, and the model itself to compare with."""

    engine: VllmEngine
    store: Store
    loaded: LoadedModel
    profile: ModelProfile
    runner: asyncio.Runner

    def plan(self, spec: dict[str, Any] | str) -> Plan:
        info = self.engine.info
        return compile_plan(
            parse_spec(spec),
            self.store,
            model=info.model,
            hidden_norms=info.hidden_norms,
            limits=Limits(max_dose=None, thinking=False),
        )

    def prompt(self, text: str) -> tuple[int, ...]:
        turns = [{"role": "user", "content": text}]
        made = self.loaded.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True
        )
        return tuple(made["input_ids"])

    def ask(self, *requests: Request) -> list[list[Delta]]:
        """Run requests together and return the deltas of each."""

        async def all_of_them() -> list[list[Delta]]:
            return await asyncio.gather(*map(collected, self.engine.generate(*requests)))

        return self.runner.run(all_of_them())

    def worker(self) -> dict[str, int]:
        """What the worker holds; a finished request is let go of at the next step."""

        async def asked() -> dict[str, int]:
            (stats,) = await self.engine._llm.collective_rpc("trimtab_stats")
            return stats

        return self.runner.run(asked())

    def logits(self, request: Request, answer: tuple[int, ...]) -> torch.Tensor:
        """Return the reference's logits for each token of an answer, `[n, vocab]`."""
        ids = [*request.prompt_ids, *answer[:-1]]
        bank = Bank(n_layers=30, hidden_size=576)
        step = None
        if request.plan is not None and request.plan.parts:
            lease = bank.acquire(request.plan)
            assert lease is not None
            own = SteeredRequest(lease, len(request.prompt_ids))
            step = SteerStep(bank, [Span(len(ids), 0, own)])
        with torch.no_grad(), steered(self.profile.layers, step):
            logits = self.loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return logits[len(request.prompt_ids) - 1 :]

    def apart(self, request: Request, deltas: list[Delta]) -> float:
        """Return the largest difference to the reference over an answer's twenty best tokens."""
        answer = tuple(token for delta in deltas for token in delta.token_ids)
        entries = [entry for delta in deltas for entry in delta.logprobs]
        assert len(entries) == len(answer)
        expected = self.logits(request, answer)
        return max(
            abs(one.logprob - float(row[one.token_id]))
            for entry, row in zip(entries, expected, strict=True)
            for one in entry.top
        )


async def collected(stream: AsyncIterator[Delta]) -> list[Delta]:
    return [delta async for delta in stream]


def running_bench(folder: Any, loaded: LoadedModel, options: dict[str, Any]) -> Iterator[Bench]:
    engine = VllmEngine("smollm2", config=VllmConfig(options=OPTIONS | options))
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        try:
            profile = profile_model(loaded.model, model_id="smollm2", tokenizer=loaded.tokenizer)
            store = Store(folder)
            bench = Bench(engine, store, loaded, profile, runner)
            fill(bench)
            yield bench
        finally:
            runner.run(engine.stop())


def fill(bench: Bench) -> None:
    """Two random vectors of 0.3 |h| at layer 14, and a random classifier."""
    info = bench.engine.info
    for seed, name in enumerate(("kind", "formal")):
        bench.store.put_vector(vector(bench, name, seed=seed))
    classifier = toy_classifier(info.model, layers=(12,), hidden=64)
    bench.store.put_classifier(classifier)


def vector(bench: Bench, name: str, *, seed: int) -> Any:
    info = bench.engine.info
    made = toy_vector(name, ref=info.model, size=1.0, seed=seed, layers=tuple(range(30)))
    sizes = 0.3 * info.hidden_norms.unsqueeze(1)
    return replace(made, directions=made.directions * sizes, default_layers=(14,))


@pytest.fixture(scope="module")
def cramped(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Eager, with small chunks, a prefix cache and too few blocks."""
    yield from running_bench(tmp_path_factory.mktemp("store"), smollm2, CRAMPED)


@pytest.fixture(scope="module")
def compiled(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Through torch.compile."""
    yield from running_bench(tmp_path_factory.mktemp("store"), smollm2, {})


QUESTIONS = (
    "How will my first day at work go? " * 8,
    "Write a short note to my landlord about the broken heating in the kitchen. " * 5,
    "What should I cook for four people tonight?",
)
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=20)


def mixed_batch(bench: Bench, sampling: SamplingParams = GREEDY) -> dict[str, Request]:
    """One request of every kind and two plain ones, with prompts of different lengths."""
    named: dict[str, Plan | None] = {"plain": None, "plain too": None}
    named |= {name: bench.plan(spec) for name, spec in SPECS.items()}
    return {
        name: Request(
            f"{name} {torch.randint(1 << 60, ()).item()}",
            bench.prompt(QUESTIONS[i % len(QUESTIONS)]),
            sampling,
            plan,
        )
        for i, (name, plan) in enumerate(named.items())
    }


def check_batch(bench: Bench, *, bound: float = BOUND) -> dict[str, list[Delta]]:
    batch = mixed_batch(bench)
    answers = dict(zip(batch, bench.ask(*batch.values()), strict=True))
    apart = {name: bench.apart(batch[name], answers[name]) for name in batch}
    assert max(apart.values()) < bound, apart
    return answers


def test_a_mixed_batch_in_pieces_and_preempted(cramped: Bench) -> None:
    """A chunk steered by another's slot, or a resumed request that is steered from its middle."""
    before = cramped.worker()["preempted"]
    answers = check_batch(cramped)
    assert cramped.worker()["preempted"] > before  # the cache was too small, as it was meant to be
    for name, deltas in answers.items():
        told = deltas[-1].steering
        assert (told is None) == name.startswith("plain")
        assert told is None or told["steered_tokens"] > 0, name
    texts = {tuple(t for d in deltas for t in d.token_ids) for deltas in answers.values()}
    assert len(texts) >= 7  # steering did something to most of them


def test_counts_are_the_embedded_engines(cramped: Bench) -> None:
    """A receipt that counts recomputed tokens twice, or cached ones not at all."""
    batch = mixed_batch(cramped)
    for _ in range(2):  # the second time from the prefix cache
        fresh = mixed_batch(cramped)
        for name, deltas in zip(fresh, cramped.ask(*fresh.values()), strict=True):
            told = deltas[-1].steering
            n_prompt = len(batch[name].prompt_ids)
            if name in ("one layer", "ablation", "guidance"):
                assert told["steered_tokens"] == n_prompt + 39, name
            if name == "answer only":
                assert told["steered_tokens"] == 39
            if name == "some of the answer":
                assert told["steered_tokens"] == n_prompt + 6
            if name == "gated":
                assert 0 < told["gates"][0]["fired"] < 1
                n_open = round(told["gates"][0]["fired"] * (n_prompt + 39))
                assert told["steered_tokens"] <= n_open + 1


def test_a_mixed_batch_compiled(compiled: Bench) -> None:
    """An op that the compiler moved, dropped or copied."""
    check_batch(compiled)
    check_batch(compiled)


def test_vectors_change_while_requests_run(cramped: Bench) -> None:
    """A replaced vector that still steers, or a deleted one that takes its requests along."""
    prompt = cramped.prompt(QUESTIONS[2])
    cramped.store.put_vector(vector(cramped, "passing", seed=7))
    old = Request("old", prompt, GREEDY, cramped.plan("2.0 passing"))

    async def change_in_between() -> list[list[Delta]]:
        (first,) = cramped.engine.generate(old)
        running = asyncio.ensure_future(collected(first))
        while not cramped.engine.stats().slots_used:
            await asyncio.sleep(0.01)
        cramped.store.put_vector(vector(cramped, "passing", seed=8))
        (second,) = cramped.engine.generate(new := Request("new", prompt, GREEDY, plan_of()))
        cramped.store.delete_vector("passing")
        asked.append(new)
        return [await running, await collected(second)]

    def plan_of() -> Plan:
        return cramped.plan("2.0 passing")

    asked = [old]
    answers = cramped.runner.run(change_in_between())
    for request, deltas in zip(asked, answers, strict=True):
        assert cramped.apart(request, deltas) < BOUND
    assert answers[0] != answers[1]


# --- the prefix cache


def cached(bench: Bench, plan: Plan | None, prompt: tuple[int, ...], **more: Any) -> int:
    """Ask for eight tokens, check them against the reference, and return what was cached."""
    name = f"cache {torch.randint(1 << 60, ()).item()}"
    request = Request(name, prompt, replace(GREEDY, max_tokens=8), plan, **more)
    (deltas,) = bench.ask(request)
    assert bench.apart(request, deltas) < BOUND
    return deltas[0].cached_tokens


def test_steered_blocks_serve_only_the_same_steering(cramped: Bench) -> None:
    """KV computed under one request's steering leaks into another's answer."""
    prompt = cramped.prompt("Tell me about the history of tea. " * 12)
    kind, formal = cramped.plan("1.5 kind"), cramped.plan("1.5 formal")
    whole = len(prompt) // 32 * 32
    assert cached(cramped, kind, prompt) == 0
    assert cached(cramped, None, prompt) == 0
    assert cached(cramped, formal, prompt) == 0
    assert cached(cramped, kind, prompt) == whole  # identical plans share
    assert cached(cramped, None, prompt) == whole


def test_plans_for_the_answer_share_the_prompt(cramped: Bench) -> None:
    """A plan that leaves the prompt alone and still has it computed anew."""
    prompt = cramped.prompt("Tell me about the history of coffee. " * 12)
    answer_only = cramped.plan(SPECS["answer only"])
    whole = len(prompt) // 32 * 32
    assert cached(cramped, None, prompt) == 0
    assert cached(cramped, answer_only, prompt) == whole
    assert (
        cached(
            cramped, cramped.plan({"vectors": [{"id": "kind", "apply": {"prompt": False}}]}), prompt
        )
        == whole
    )


def test_a_steered_answer_is_not_a_later_prompts_cache(cramped: Bench) -> None:
    """The next turn contains the answer's tokens, but not the states that steering gave them."""
    prompt = cramped.prompt("Tell me about the history of cocoa. " * 3)
    plan = cramped.plan(SPECS["answer only"])
    request = Request("turn one", prompt, replace(GREEDY, max_tokens=100), plan)
    (deltas,) = cramped.ask(request)
    answer = tuple(token for delta in deltas for token in delta.token_ids)
    # A block that holds any token of the answer must not be found again.
    assert cached(cramped, None, prompt + answer) <= len(prompt) // 32 * 32
    assert cached(cramped, plan, prompt + answer) <= (len(prompt) + len(answer)) // 32 * 32


def test_a_clients_own_salt_still_separates(cramped: Bench) -> None:
    """Two tenants with the same steering find out what the other has asked."""
    prompt = cramped.prompt("Tell me about the history of bread. " * 12)
    plan = cramped.plan("1.5 kind")
    whole = len(prompt) // 32 * 32
    for one in (plan, None):
        assert cached(cramped, one, prompt, cache_salt="alice") == 0
        assert cached(cramped, one, prompt, cache_salt="bob") == 0
        assert cached(cramped, one, prompt, cache_salt="alice") == whole


def test_a_gate_that_reads_the_prompt_shares_nothing(cramped: Bench) -> None:
    """The same beginning under another end, where the gate decides otherwise."""
    prompt = cramped.prompt("Is it warm? " * 8)
    assert 32 < len(prompt) <= 64
    when = {"probe": "tone/casual", "above": 0.01, "per": "prompt"}
    plan = cramped.plan({"vectors": [{"id": "kind"}], "when": when})
    assert cached(cramped, plan, prompt) == 0
    assert cached(cramped, plan, prompt) == 0


# --- trouble stays its own


def test_a_broken_request_ends_alone(cramped: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad plan that takes its batch, or the engine, along."""
    from trimtab.serving.engines.vllm import engine as module

    packed: Callable[..., dict[str, Any]] = module.packed_request

    def broken(plan: Plan | None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        made = packed(plan, *args, **kwargs)
        if plan is bad.plan:
            made["parts"][0]["layers"]["14"]["add"] = [[576], b"too short"]
        return made

    monkeypatch.setattr(module, "packed_request", broken)
    batch = mixed_batch(cramped)
    bad = Request("bad", cramped.prompt("Hello"), GREEDY, cramped.plan("0.77 kind"))

    async def together() -> list[Any]:
        streams = cramped.engine.generate(bad, *batch.values())
        return await asyncio.gather(*map(collected, streams), return_exceptions=True)

    failed, *answers = cramped.runner.run(together())
    assert isinstance(failed, EngineError)
    for request, deltas in zip(batch.values(), answers, strict=True):
        assert cramped.apart(request, deltas) < BOUND


def test_seeds_hold_also_where_a_prompt_is_split(cramped: Bench) -> None:
    """vLLM turns a generator back that has none of that on a CPU, and ends with every request."""
    drawn = replace(GREEDY, temperature=1.0, seed=7, max_tokens=12)
    request = Request("seeded", cramped.prompt(QUESTIONS[1]), drawn, cramped.plan("1.5 kind"))
    assert len(request.prompt_ids) > 64  # more than one pass holds
    (alone,) = cramped.ask(request)
    crowd = [replace(request, id=f"seeded {i}") for i in range(3)]
    for deltas in cramped.ask(*mixed_batch(cramped).values(), *crowd)[-3:]:
        assert [d.token_ids for d in deltas] == [d.token_ids for d in alone]


def test_leaving_early_frees_everything(cramped: Bench) -> None:
    """A client that hangs up in mid-stream and keeps its slots."""

    async def leave() -> None:
        streams = cramped.engine.generate(*mixed_batch(cramped).values())
        firsts = await asyncio.gather(*(anext(stream) for stream in streams))
        assert all(firsts)
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]
        while cramped.engine.stats().running:
            await asyncio.sleep(0.01)

    cramped.runner.run(leave())
    cramped.ask(Request("one more", cramped.prompt("Hi"), replace(GREEDY, max_tokens=4)))
    assert cramped.engine.stats().slots_used == 0
    stats = cramped.worker()
    assert (stats["requests"], stats["slots_used"], stats["readers"]) == (0, 0, 0)


def test_probes_read_what_the_embedded_engine_reads(cramped: Bench) -> None:
    """Readings of another token, another request, or lost where outputs are merged."""
    plan = cramped.plan("1.5 kind")
    (reader,) = {
        guide.reader
        for term in cramped.plan(SPECS["guidance"]).parts[0].layers.values()
        for guide in term.guides
    }
    batch = mixed_batch(cramped)
    probed = Request("probed", cramped.prompt(QUESTIONS[0]), GREEDY, plan, (reader,))
    deltas = cramped.ask(probed, *batch.values())[0]
    rows = [row for delta in deltas for row in delta.probes]
    answer = tuple(token for delta in deltas for token in delta.token_ids)
    assert len(rows) == len(answer) == 40
    expected = readings(cramped, probed, answer, reader)
    for row, own in zip(rows, expected, strict=True):
        assert row[0] == pytest.approx(own, abs=1e-4)


def readings(
    bench: Bench, request: Request, answer: tuple[int, ...], reader: Any
) -> list[list[float]]:
    from trimtab.kernels import probabilities, read
    from trimtab.steering.model.hooks import captured

    ids = [*request.prompt_ids, *answer[:-1]]
    bank = Bank(n_layers=30, hidden_size=576)
    assert request.plan is not None
    lease = bank.acquire(request.plan)
    assert lease is not None
    step = SteerStep(bank, [Span(len(ids), 0, SteeredRequest(lease, len(request.prompt_ids)))])
    layers = bench.profile.layers
    with torch.no_grad(), steered(layers, step), captured(layers, [reader.layer]) as states:
        bench.loaded.model(input_ids=torch.tensor([ids]), use_cache=False)
    hidden = states[reader.layer][0, len(request.prompt_ids) - 1 :]
    found: list[list[float]] = probabilities(
        read(hidden, reader.classifier), reader.classifier
    ).tolist()
    return found

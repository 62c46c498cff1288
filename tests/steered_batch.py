"""A batch of requests steered in every way, and what transformers says each of them must be.

The reference is a forward pass of the transformers model with our hooks over the prompt and the
tokens that vLLM chose; logits are compared, so that no near tie can turn a test over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from toy_classifier import toy_classifier

from trimtab.serving.engines.vllm.plan_wire import KEY, packed_network, packed_request, readers_of
from trimtab.serving.engines.vllm.reports import INBOXES, Inbox
from trimtab.steering.artifact import ModelRef
from trimtab.steering.bank import Bank
from trimtab.steering.classifier import ClassifierArtifact
from trimtab.steering.compile import Limits, compile_plan
from trimtab.steering.model.hooks import steered
from trimtab.steering.model.loading import LoadedModel
from trimtab.steering.model.profile import profile_model
from trimtab.steering.plan import Plan
from trimtab.steering.spec import parse_spec
from trimtab.steering.steered_request import Counts, SteeredRequest
from trimtab.steering.step import Span, SteerStep
from trimtab.steering.vector import VectorArtifact

TOP = 20
BOUND = 1e-3  # largest difference of a logit; they are up to 36
SHOWS = 0.3  # steering that changes the logits less than this was not seen to be applied

GATE = {"probe": "tone/expert", "above": 0.7, "layer": 9}
GUIDED = {"classifier": "tone", "target": ["expert"], "steps": 3, "dose": 0.4, "over_dose": True}
PLAIN = {"plain": None}
WHOLE = {
    "added": {"vectors": [{"id": "a", "layers": [12]}]},
    "kept norm": {
        "vectors": [{"id": "b", "scale": 0.2, "normalize": True, "layers": list(range(30))}]
    },
    "guided": {"guidance": [GUIDED]},
    "ablated": {"ablate": [{"id": "b", "layers": [5, 6, 7, 20]}]},
}
WINDOWS = {
    "answer only": {"vectors": [{"id": "a", "layers": [12, 22], "apply": {"prompt": False}}]},
    "first": {"vectors": [{"id": "b", "layers": [10], "apply": {"prompt": False, "first": 5}}]},
    "after": {"vectors": [{"id": "a", "layers": [14], "apply": {"prompt": False, "after": 4}}]},
}
GATES = {
    "token gate": {"vectors": [{"id": "a", "layers": [12]}], "when": GATE},
    "prompt gate": {"vectors": [{"id": "b", "layers": [18]}], "when": GATE | {"per": "prompt"}},
    "gated guidance": {"guidance": [GUIDED | {"when": GATE | {"above": None, "below": 0.7}}]},
}

TEXTS = (
    "A list of colours: red, green, blue, red, green, blue, red, green,",
    "The river rises in the hills and runs through three towns. It was late in the year when",
    "one two three four one two three four one two three four one two",
)


class Drawn:
    """Vectors `a` and `b` a third of each layer's |h| long, and a classifier `tone`, all random."""

    def __init__(self, ref: ModelRef, norms: torch.Tensor) -> None:
        self._ref, self._norms = ref, norms
        self._tone = toy_classifier(ref, layers=(9, 13), hidden=16)

    def vector(self, name: str, *, param: str | None = None) -> VectorArtifact:
        n, width = len(self._norms), self._ref.hidden_size
        rows = torch.randn(n, width, generator=torch.Generator().manual_seed(ord(name)))
        rows = rows / rows.norm(dim=1, keepdim=True) * self._norms.unsqueeze(1) / 3
        return VectorArtifact(
            id=name,
            model=self._ref,
            layers=tuple(range(n)),
            directions=rows,
            default_layers=(n // 2,),
            method="caa",
        )

    def classifier(self, name: str, *, param: str | None = None) -> ClassifierArtifact:
        return self._tone


@dataclass
class Answered:
    """One request as vLLM ran it: its tokens, the likeliest logits at each, what was reported."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logits: list[dict[int, float]] = field(default_factory=list)
    most_at_once: int = 0
    reason: str | None = None
    inbox: Inbox = field(default_factory=Inbox)


class SteeredBatch:
    """Compiles the batch's plans, has vLLM run them, and computes the same with transformers.

    Args:
        loaded: the transformers model, float32.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self._profile = profile_model(loaded.model, model_id="smollm2", tokenizer=loaded.tokenizer)
        self._source = Drawn(self._profile.ref, self._profile.hidden_norms)

    def plans(self, specs: Mapping[str, Any]) -> dict[str, Plan | None]:
        """Return a plan of each spec, by the same name."""
        return {name: None if spec is None else self._plan(spec) for name, spec in specs.items()}

    def _plan(self, spec: Any) -> Plan:
        return compile_plan(
            parse_spec(spec),
            self._source,
            model=self._profile.ref,
            hidden_norms=self._profile.hidden_norms,
            limits=Limits(max_dose=None),
        )

    def run(
        self,
        llm: Any,
        plans: Mapping[str, Plan | None],
        *,
        max_tokens: int = 16,
        adapters: Mapping[str, Any] | None = None,
        texts: Sequence[str] = TEXTS,
    ) -> dict[str, Answered]:
        """Run plans in one batch, each after one of the texts in turn.

        Args:
            llm: a `vllm.LLM` whose engine core is in this process.
            plans: of each request, by name.
            max_tokens: of each answer.
            adapters: vLLM's `LoRARequest` of those that have one.
            texts: the prompts.
        """
        engine = llm.llm_engine
        for plan in plans.values():
            for digest, reader in readers_of(plan, ()).items():
                packed = packed_network(reader.classifier)
                llm.collective_rpc("trimtab_learn", args=(digest, packed))
        answers: dict[str, Answered] = {}
        for i, (name, plan) in enumerate(plans.items()):
            ids = self.tokenizer(texts[i % len(texts)])["input_ids"]
            answers[name] = Answered(ids)
            INBOXES[name] = answers[name].inbox
            engine.add_request(
                name,
                {"prompt_token_ids": ids},
                _params(plan, max_tokens=max_tokens),
                lora_request=(adapters or {}).get(name),
            )
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    _take(answers[output.request_id], output)
        finally:
            for name in plans:
                INBOXES.pop(name, None)
        return answers

    def reference(self, answer: Answered, plan: Plan | None) -> tuple[torch.Tensor, Counts | None]:
        """Return the logits that chose each token, `[n_tokens, vocabulary]`, and what was steered.

        The last token was chosen but not run.
        """
        ids = answer.prompt + answer.tokens[:-1]
        request, step = None, None
        if plan is not None:
            bank = Bank(
                n_layers=len(self._profile.layers), hidden_size=self._profile.ref.hidden_size
            )
            lease = bank.acquire(plan)
            assert lease is not None
            request = SteeredRequest(lease, len(answer.prompt))
            step = SteerStep(bank, [Span(len(ids), 0, request)])
        with torch.no_grad(), steered(self._profile.layers, step):
            logits = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        if step is not None:
            step.finish()
        counts = None if request is None else request.count(len(ids))
        return logits[len(answer.prompt) - 1 :], counts

    def check(self, answers: Mapping[str, Answered], plans: Mapping[str, Plan | None]) -> None:
        """Compare answers with the reference: logits, steering that shows, receipts."""
        for name, answer in answers.items():
            plan = plans[name]
            logits, counts = self.reference(answer, plan)
            assert answer.inbox.failure is None, name
            assert distance(answer, logits) <= BOUND, name
            if plan is None or counts is None:
                continue
            assert answer.inbox.is_applied, name
            assert distance(answer, self.reference(answer, None)[0]) >= SHOWS, name
            if any(part.gate is not None for part in plan.parts):
                n_run = len(answer.prompt) + len(answer.tokens) - 1
                assert answer.inbox.counts_at(n_run) == counts, name


def distance(answer: Answered, logits: torch.Tensor) -> float:
    """Return the largest difference of `TOP` logits, by token and by rank, over all tokens."""
    assert len(answer.tokens) == len(answer.logits) == len(logits)
    worst = 0.0
    for mine, theirs in zip(answer.logits, logits, strict=True):
        ids = torch.tensor(list(mine))
        values = torch.tensor(list(mine.values()))
        by_token = (values - theirs[ids]).abs().max()
        ranked = values.sort(descending=True).values[:TOP] - theirs.topk(TOP).values
        worst = max(worst, float(by_token), float(ranked.abs().max()))
    return worst


def _params(plan: Plan | None, *, max_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        logprobs=TOP,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=None if plan is None else {KEY: packed_request(plan)},
        skip_reading_prefix_cache=True if plan is not None and plan.needs_whole_prompt else None,
    )


def _take(answer: Answered, output: Any) -> None:
    made = output.outputs[0]
    answer.tokens += made.token_ids
    answer.most_at_once = max(answer.most_at_once, len(made.token_ids))
    answer.logits += [{token: p.logprob for token, p in one.items()} for one in made.logprobs or ()]
    answer.reason = made.finish_reason or answer.reason

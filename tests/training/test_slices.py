"""The one door to a model: every use of it is a bounded piece that leaves nothing behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from toy_chat import toy_chat
from toys import TOYS

from trimtab.attribution.errors import CancelledError
from trimtab.steering.model.loading import LoadedModel
from trimtab.steering.model.profile import ModelProfile, profile_model
from trimtab.steering.plan import additive_plan
from trimtab.training.calibration import Budget
from trimtab.training.classifiers import doses
from trimtab.training.classifiers.build import build_classifier
from trimtab.training.classifiers.doses import DoseBudget, LabelSet, calibrate_doses
from trimtab.training.classifiers.examples import Example, ExampleSet
from trimtab.training.classifiers.own_answers import own_answers
from trimtab.training.classifiers.states import read_rows, tokens_read
from trimtab.training.scoring import answer_logprobs, answer_of, generate, perplexity
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.activations import hidden_states
from trimtab.training.vectors.build import build_vector
from trimtab.training.vectors.pairs import Pair, PairSet

SLICE = 96
QUICK = Budget(n_text_tokens=200, n_generated=4, n_prompts=2)
PAIRS = PairSet(
    "letters",
    tuple(
        Pair(f"why q{i}?", "abcab"[i % 3 :] * (2 + i % 4), "xyzxy"[i % 3 :] * 2) for i in range(16)
    ),
)
# A token a byte: a prompt longer than a slice, and answers that begin in the second part of two and
# in the third of three.
LONG = (
    Pair("why " * 25, "abcab" * 8, "xyzxy" * 9),
    Pair("Q?", "abacab" * 25, "xyxzxy" * 20),
    Pair("why " * 40, "abcab" * 2, "xyzxy" * 3),
)
LONG_PAIRS = PairSet("letters", (*PAIRS.pairs[:13], *LONG))
EXAMPLES = ExampleSet(
    "letters",
    tuple(
        Example((("user", f"{style}\n{question}"),), "", (style,), group=question)
        for question in (*(f"q{i}" for i in range(10)), "why " * 25, "how " * 40)
        for style in ("kind", "curt")
    ),
)
Stop = Callable[[int], bool]


class Watched:
    """Slices that look at the model before and after each piece of work.

    Attributes:
        n: pieces so far.
        sizes: tokens of each piece, all its rows and passes together.
        n_rows: most rows of a pass.
    """

    def __init__(self, loaded: LoadedModel, profile: ModelProfile) -> None:
        self.n = 0
        self.sizes: list[int] = []
        self.n_rows = 0
        self.stops: Stop = lambda n: False
        self._model: Any = loaded.model
        self._is_inside = False
        self._states: list[weakref.ref[torch.Tensor]] = []
        inner = loaded.model.base_model
        self._inner, self._forward = inner, inner.forward
        inner.forward = self._run
        for layer in profile.layers:
            layer.forward = self._noted(layer.forward)

    def _run(self, *args: Any, **inputs: Any) -> Any:
        assert self._is_inside, "the model is used outside of a slice"
        given = inputs.get("input_ids")
        given = inputs["inputs_embeds"] if given is None else given
        self.sizes[-1] += given.shape[0] * given.shape[1]
        self.n_rows = max(self.n_rows, given.shape[0])
        return self._forward(*args, **inputs)

    def _noted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **inputs: Any) -> Any:
            output = forward(*args, **inputs)
            hidden = output[0] if isinstance(output, tuple) else output
            self._states.append(weakref.ref(hidden))
            return output

        return run

    def n_hooks(self) -> int:
        modules = self._model.modules()
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    def __call__(self, work: Callable[[], Any]) -> Any:
        assert not self._is_inside, "a slice within a slice"
        self.n += 1
        if self.stops(self.n):
            raise CancelledError("It was cancelled.")
        self._is_inside = True
        self.sizes.append(0)
        try:
            result = work()
        finally:
            self._is_inside = False
        assert self.n_hooks() == 0
        gc.collect(0)
        assert not [ref for ref in self._states if ref() is not None], "a state outlives its slice"
        self._states.clear()
        return result


@pytest.fixture
def watched() -> tuple[SteeredModel, Watched]:
    loaded = toy_chat()
    profile = profile_model(loaded.model, model_id="toy", tokenizer=loaded.tokenizer)
    watch = Watched(loaded, profile)
    return SteeredModel(loaded, profile, slices=watch, slice_tokens=SLICE), watch


def vector(host: SteeredModel, method: str, *, pairs: PairSet = PAIRS, **options: Any) -> Any:
    return build_vector(
        host, pairs, id="v", method=method, options=options, budget=QUICK, is_mapped=True
    )


def classifier(host: SteeredModel) -> Any:
    data = own_answers(host, EXAMPLES, n_tokens=4)
    made = build_classifier(host, data, id="c", hidden=8, position="both")
    one = [LabelSet(target=("kind",)), LabelSet(avoid=("kind",), is_reflection=True)]
    budget = DoseBudget(n_prompts=4, n_tokens=4, n_evaluations=3)
    return calibrate_doses(host, made, label_sets=one, budget=budget)


USES: dict[str, Callable[[SteeredModel], Any]] = {
    "mean_difference": lambda host: vector(host, "mean_difference", pairs=LONG_PAIRS),
    "grains": lambda host: vector(host, "grains"),
    "grains, answers": lambda host: vector(
        host, "grains", read="answer", mask="drop", attribution="gradient_x_input"
    ),
    "classifier": classifier,
}


@pytest.fixture(autouse=True)
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy of random weights loops on every question, and one token a byte is many passes."""
    monkeypatch.setattr("trimtab.training.coherence.MAX_REPETITION", 1.0)
    monkeypatch.setattr(doses, "neutral_questions", lambda: [f"Why {i}?" for i in range(8)])


@pytest.mark.parametrize("use", USES)
def test_every_use_of_the_model_is_a_bounded_slice(
    watched: tuple[SteeredModel, Watched], use: str
) -> None:
    """Catches a pass that meets a server's decoding step, one that others wait long for, and hooks
    or hidden states that outlive it."""
    host, watch = watched
    USES[use](host)
    assert watch.n > 20
    assert watch.n_rows > 1
    assert SLICE / 2 < max(watch.sizes) <= SLICE


@pytest.mark.parametrize("use", ["grains", "classifier"])
def test_work_that_is_called_off_ends_there(
    watched: tuple[SteeredModel, Watched], use: str
) -> None:
    """Catches a builder that swallows the end of its job, or keeps a plan in the bank."""
    host, watch = watched
    for last in (1, 2, 30, 60):
        watch.n = 0
        watch.stops = lambda n, last=last: n >= last  # type: ignore[misc]
        with pytest.raises(CancelledError):
            USES[use](host)
        assert watch.n == last
        assert watch.n_hooks() == 0
        assert host._bank.n_live == 0
    watch.stops = lambda n: False
    USES[use](host)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mamba", "jamba", "lfm2"])
def test_small_slices_change_no_measure(name: str) -> None:
    """Catches rows that are lost, doubled or swapped where passes are cut smaller, and a text read
    in parts whose later ones miss the earlier, stand at other places or go unsteered. State-space
    models do not go on from their cache with several tokens."""
    loaded = toy_chat(TOYS[name]())
    profile = profile_model(loaded.model, model_id="toy", tokenizer=loaded.tokenizer)
    own, shared = (SteeredModel(loaded, profile, slice_tokens=n) for n in (None, 64))
    answers = [
        answer_of(loaded.tokenizer, pair.prompt, text)
        for pair in LONG_PAIRS.pairs
        for text in (pair.preferred, pair.dispreferred)
    ]
    chance = torch.Generator().manual_seed(0)
    # At the first layer: what it does to a token reaches the later ones through the cache.
    plan = additive_plan({0: 0.3 * torch.randn(profile.ref.hidden_size, generator=chance)})
    for position in ("mean", -2):
        whole, cut = (hidden_states(host, answers, position=position) for host in (own, shared))
        assert torch.allclose(whole, cut, atol=1e-4)
        assert not torch.allclose(whole[0], whole[1], atol=1e-2)
    places = [tokens_read(answer, "both") for answer in answers]
    whole, cut = (read_rows(host, answers, places, layers=[0, 1]).states for host in (own, shared))
    assert torch.allclose(whole, cut, atol=1e-4)
    whole, cut = (answer_logprobs(host, answers, plan=plan) for host in (own, shared))
    assert torch.allclose(whole, cut, atol=1e-4)
    assert not torch.allclose(whole[0], whole[1], atol=1e-3)
    ids = [5 + i * i % 90 for i in range(230)]
    whole, cut, plain = (
        perplexity(host, ids, plan=steering)
        for host, steering in ((own, plan), (shared, plan), (shared, None))
    )
    assert cut == pytest.approx(whole, rel=1e-5)
    assert plain != pytest.approx(whole, rel=1e-3)
    prompts = [answer.ids[: answer.n_prompt] for answer in answers[::2]]
    longer, shorter = (generate(host, prompts, 6, plan=plan) for host in (own, shared))
    assert [g.ids for g in longer] == [g.ids for g in shorter]

"""Laws of GrAInS: which tokens it masks, what it reads, where its direction points."""

from __future__ import annotations

import pytest
import torch
from toy_chat import toy_chat
from toys import mamba

from trimtab.attribution.errors import AttributionError
from trimtab.attribution.problem import Problem
from trimtab.attribution.prompt import Prompt, prompt_from_messages
from trimtab.attribution.subject import Subject
from trimtab.steering.errors import DataError, NotFoundError
from trimtab.steering.model.hooks import captured
from trimtab.steering.model.profile import profile_model
from trimtab.training.calibration import Budget
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.build import build_vector
from trimtab.training.vectors.grains import (
    COMPONENTS,
    Grains,
    component_of,
    objective_of,
    prompt_of,
    strongest,
    token_scores,
)
from trimtab.training.vectors.masked_prompts import last_states
from trimtab.training.vectors.pairs import Pair, PairSet, concept
from trimtab.training.vectors.registry import make

MASKS = ("pad", "mean", "zero", "drop")
PAIRS = [Pair(f"why q{i}?", "abcab"[i % 3 :] * 2, "xyzxy"[i % 3 :] * 2) for i in range(16)]
SWAPPED = [Pair(p.prompt, p.dispreferred, p.preferred) for p in PAIRS]


@pytest.fixture(scope="module")
def host() -> SteeredModel:
    return toy_host()


def toy_host(model=None) -> SteeredModel:
    loaded = toy_chat(model)
    return SteeredModel(loaded, profile_model(loaded.model, model_id="toy"))


@pytest.fixture(scope="module")
def subject(host) -> Subject:
    return Subject(host.loaded, host.profile)


def prompt(host, text: str = "a cat sat") -> Prompt:
    return prompt_from_messages(host.tokenizer, [{"role": "user", "content": text}])


# --- which tokens


def test_only_tokens_of_the_sign_are_taken(host):
    """Catches topping up with tokens of the other sign or with ones that did nothing, and more of
    one sign than of the other, whose masking alone would then look like a direction."""
    scores = torch.tensor([0.5, -0.1, 0.0, 2.0, -3.0, -0.2, 0.0, 0.0, 0.0])
    first = prompt(host).content[0]
    assert strongest(prompt(host), scores, 9) == ([first + 3, first], [first + 4, first + 5])
    assert strongest(prompt(host), scores, 1) == ([first + 3], [first + 4])
    assert strongest(prompt(host), scores.abs(), 2) == ([], [])


def test_only_words_of_the_prompt_are_taken(host, subject):
    """Catches template words or end marks masked along with the prompt's own."""
    own = prompt(host, PAIRS[0].prompt)
    scores = token_scores(host, subject, PAIRS[0], "attnlrp")
    assert scores.shape == (len(PAIRS[0].prompt),)  # a token a byte
    for k in (1, 3, 99):
        taken = strongest(own, scores, k)
        assert 0 < len(taken[0]) == len(taken[1]) <= k
        assert set(taken[0] + taken[1]) <= set(own.content)
    assert "".join(own.tokens[i].text for i in own.content) == PAIRS[0].prompt


def test_scores_turn_with_the_sides(host, subject):
    """Catches an objective that reads one answer only, or both with the same sign."""
    there = token_scores(host, subject, PAIRS[1], "kernel_shap")
    back = token_scores(host, subject, SWAPPED[1], "kernel_shap")
    assert there.abs().max() > 1e-3
    assert torch.allclose(there, -back, atol=1e-4)


# --- what is read


@pytest.mark.parametrize("mask", MASKS)
def test_nothing_masked_reads_the_model_itself(host, subject, mask):
    """Catches a layer off by one, another token's state, or a variant that disturbs its mate."""
    own = prompt(host)
    found = last_states(subject, own, [(), own.content[:2], ()], mask=mask)
    with torch.inference_mode(), captured(host.profile.layers, range(2)) as states:
        host.model(input_ids=torch.tensor([own.ids]))
    plain = torch.stack([states[n][0, -1] for n in range(2)])
    assert torch.allclose(found[0], plain, atol=1e-5)
    assert torch.equal(found[0], found[2])
    assert (found[1] - found[0]).abs().amax(1).min() > 1e-3


def test_a_pad_stands_where_the_token_stood(host, subject):
    """Catches a masked prompt that grew shorter, or another token replaced."""
    own = prompt(host)
    at = own.content[4]
    ids = list(own.ids)
    ids[at] = host.tokenizer.eos_token_id  # the toy has no pad token
    with torch.inference_mode(), captured(host.profile.layers, range(2)) as states:
        host.model(input_ids=torch.tensor([ids]))
    plain = torch.stack([states[n][0, -1] for n in range(2)])
    assert torch.allclose(last_states(subject, own, [[at]], mask="pad")[0], plain, atol=1e-5)


@pytest.mark.parametrize("is_tree", [True, False])
def test_answers_are_read_after_the_prompt_they_follow(host, subject, is_tree):
    """Catches answers that see each other, prompt tokens counted in, and a mask that is lost."""
    if not is_tree:
        host = toy_host(mamba())
        subject = Subject(host.loaded, host.profile)
    assert (subject.tree_problem is None) == is_tree
    own = prompt(host)
    gone, answers = own.content[-2:], [(65, 40, 83), (70, 101)]
    found = last_states(subject, own, [(), gone], mask="pad", answers=answers)
    for row, taken in zip(found, ((), gone), strict=True):
        ids = [host.tokenizer.eos_token_id if i in taken else x for i, x in enumerate(own.ids)]
        means = []
        for answer in answers:
            with torch.inference_mode(), captured(host.profile.layers, range(2)) as states:
                host.model(input_ids=torch.tensor([[*ids, *answer]]))
            means.append(torch.stack([states[n][0, len(ids) :].mean(0) for n in range(2)]))
        assert torch.allclose(row, torch.stack(means).mean(0), rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-4  # a random state-space model forgets quickly


def test_a_dropped_token_cannot_be_read(host, subject):
    """Catches a token that is still attended to: what it was would then still be seen."""
    one, other = prompt(host, "a cat sat"), prompt(host, "a dog sat")
    gone = one.content[2:5]
    states = [last_states(subject, p, [gone, ()], mask="drop") for p in (one, other)]
    assert torch.allclose(states[0][0], states[1][0], atol=1e-5)
    assert (states[0][1] - states[1][1]).abs().max() > 1e-3


def test_tokens_are_not_dropped_from_a_model_that_cannot(host):
    """Catches a state-space model that reads on what was to be hidden, without a word."""
    other = toy_host(mamba())
    with pytest.raises(AttributionError, match="hidden from this model"):
        Grains(mask="drop", attribution="random").find(other, PAIRS)
    assert torch.isfinite(Grains().find(other, PAIRS[:2])).all()


# --- where it points


@pytest.mark.parametrize("kind", COMPONENTS)
def test_a_component_keeps_what_differences_share(kind):
    """Catches a centred component, which loses the mean, and a sign left to the solver."""
    noise = torch.randn(40, 3, 16, generator=torch.Generator().manual_seed(0)) * 0.2
    for sign in (1.0, -1.0):
        shared = torch.zeros(3, 16)
        shared[torch.arange(3), torch.arange(3)] = sign
        found = component_of(shared + noise, kind)
        assert torch.nn.functional.cosine_similarity(found, shared, dim=1).min() > 0.9
    if kind == "pca":
        assert torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-5)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("mask", MASKS)
def test_swapping_the_answers_turns_the_direction(host, mask, component):
    """Catches a sign that does not come from which answer is preferred."""
    method = Grains(mask=mask, component=component, read="prompt" if mask == "pad" else "answer")
    there, back = method.find(host, PAIRS), method.find(host, SWAPPED)
    assert there.shape == (2, 32)
    assert torch.allclose(there, -back, rtol=1e-3, atol=1e-4)


def test_with_one_token_a_side_the_mean_is_exact(host, subject):
    """Catches d- added instead of subtracted, and a pair counted where it has no such token."""
    sides: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for pair in PAIRS[:5]:
        own = prompt_of(host, pair.prompt)
        taken = strongest(own, token_scores(host, subject, pair, "attnlrp"), 1)
        whole, *masked = last_states(subject, own, [(), *taken], mask="mean")
        for rows, numbers, state in zip(sides, taken, masked, strict=True):
            rows.extend([whole - state] * len(numbers))
    expected = torch.stack(sides[0]).mean(0) - torch.stack(sides[1]).mean(0)
    found = Grains(k=1, mask="mean", component="mean", read="prompt").find(host, PAIRS[:5])
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_same_pairs_give_the_same_direction(host):
    """Catches chance in the method, its control included."""
    for method in (Grains(), Grains(attribution="random")):
        assert torch.equal(method.find(host, PAIRS[:6]), method.find(host, PAIRS[:6]))


def test_every_option_changes_the_direction(host):
    """Catches an option that is read and ignored; the random control is one of them."""
    base = {"mask": "pad", "component": "mean", "read": "answer"}
    options = [
        base,
        base | {"k": "1"},
        base | {"mask": "mean"},
        base | {"mask": "drop"},
        base | {"component": "pca"},
        base | {"read": "prompt"},
        base | {"attribution": "random"},
        base | {"attribution": "ig"},
    ]
    found = [make("grains", o).find(host, PAIRS[:6])[1] for o in options]  # type: ignore[union-attr]
    units = torch.stack(found) / torch.stack(found).norm(dim=1, keepdim=True)
    alike = units @ units.T - 2 * torch.eye(len(options))
    assert alike.max() < 0.9999


# --- refusals


def test_pairs_without_a_prompt_are_refused(host):
    """Catches a direction from the template alone; and reading everything before saying so."""
    texts = PairSet("texts", tuple(Pair("", "abc" * i, "xyz" * i) for i in range(1, 12)))
    stages: list[str] = []
    with pytest.raises(DataError, match=r"attributes prompts.* has none.*another method"):
        build_vector(
            host, texts, id="v", method="grains", progress=lambda name, *_: stages.append(name)
        )
    assert not stages


def test_prompts_that_speak_for_one_answer_only_are_refused(host, monkeypatch):
    """Catches half a direction, or a crash, where no prompt has tokens of both signs."""
    monkeypatch.setattr(
        "trimtab.training.vectors.grains.token_scores",
        lambda _host, _subject, pair, _method: torch.ones(len(pair.prompt)),
    )
    with pytest.raises(DataError, match="In no prompt"):
        Grains().find(host, PAIRS)


def test_options_are_checked():
    """Catches a value that only fails after the model was loaded and asked."""
    with pytest.raises(DataError, match="'k' is 0"):
        make("grains", {"k": "0"})
    with pytest.raises(DataError, match="expected one of zero, pad, mean, drop"):
        make("grains", {"mask": "hide"})
    with pytest.raises(DataError, match="expected one of mean, pca"):
        make("grains", {"component": "svd"})
    with pytest.raises(DataError, match="expected one of answer, prompt"):
        make("grains", {"read": "question"})
    with pytest.raises(NotFoundError, match="Did you mean 'attnlrp'"):
        make("grains", {"attribution": "attnlpr"})


# --- whole


def test_a_vector_is_built_and_calibrated(host):
    """Catches a method that the build cannot call, or whose work nobody sees."""
    seen: dict[str, tuple[int, int]] = {}

    def progress(name: str, done: int, total: int) -> None:
        seen[name] = (done, total)

    vector = build_vector(
        host,
        PairSet("letters", tuple(PAIRS)),
        id="early",
        method="grains",
        options={"k": "2"},
        budget=Budget(n_text_tokens=64, n_generated=6, n_prompts=2),
        progress=progress,
    )
    assert vector.method == "grains"
    assert vector.settings["k"] == 2
    assert vector.calibration is not None
    assert seen["attributing prompts"] == (12, 12)


@pytest.mark.slow
def test_masking_real_tokens_moves_the_answers_as_their_sign_says(smollm2):
    """Catches the two signs exchanged: masking what speaks for the preferred answer must cost it,
    masking what speaks against it must help. The effect of the whole vector on held pairs of this
    small model is too weak to be a law (docs/vectors.md)."""
    profile = profile_model(smollm2.model, model_id="smollm2", tokenizer=smollm2.tokenizer)
    host = SteeredModel(smollm2, profile)
    subject = Subject(smollm2, profile)
    changes = []
    for pair in concept("optimistic").build[:7]:
        own = prompt_of(host, pair.prompt)
        both = strongest(own, token_scores(host, subject, pair, "attnlrp"), 3)
        problem = Problem(subject, own, objective_of(host, pair), baseline="pad")
        keep = torch.tensor([[i not in taken for i in own.content] for taken in ((), *both)])
        whole, without_for, without_against = problem.values_kept(keep)
        if both[0]:
            changes.append((without_for - whole, without_against - whole))
    assert len(changes) >= 5
    without_for, without_against = torch.tensor(changes).mean(0)
    assert without_for < -0.5
    assert without_against > 0.5

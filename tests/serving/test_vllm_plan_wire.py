"""Plans and networks on their way into vLLM's workers, and what its prefix cache is told."""

from __future__ import annotations

from types import SimpleNamespace as Fake
from typing import Any

import pytest
import torch
from toy_classifier import toy_classifier
from toy_plans import MODEL, PLANS, SPECS, arrived, compiled

from trimtab.serving.engines.vllm.plan_wire import (
    KEY,
    packed_network,
    packed_request,
    readers_of,
    unpacked_network,
    unpacked_request,
)
from trimtab.serving.engines.vllm.prefix_cache import answer_key, cache_rule, salted
from trimtab.steering.plan import Part

kinds = pytest.mark.parametrize("kind", SPECS)


@kinds
def test_a_plan_arrives_as_it_was_sent(kind: str) -> None:
    """A field that is lost or rounded on the way steers by another plan than the receipt says."""
    plan = PLANS[kind]
    networks = {d: r.classifier for d, r in readers_of(plan, ()).items()}
    carried = arrived(packed_request(plan, marks=(5, 6)))
    back = unpacked_request(carried, networks.__getitem__)
    assert back.plan is not None
    assert (back.marks, back.measures, back.probes) == ((5, 6), False, ())
    assert back.plan.fingerprint == plan.fingerprint
    assert back.plan.prompt_fingerprint == plan.prompt_fingerprint
    for mine, sent in zip(back.plan.parts, plan.parts, strict=True):
        # A digest covers window, gate, rows and guides to the last bit.
        assert Part.of(mine.window, mine.gate, mine.layers).digest == sent.digest == mine.digest
        assert (mine.gate and mine.gate.probe) == (sent.gate and sent.gate.probe)


def test_a_network_arrives_as_it_was_sent() -> None:
    """A transposed or missing matrix reads other labels."""
    for hidden in (0, 8):
        network = toy_classifier(MODEL, hidden=hidden, is_exclusive=False).at(1)
        back = unpacked_network(arrived(packed_network(network)))
        assert not back.is_exclusive
        for name in ("w_in", "b_in", "gram", "w_mid", "b_mid", "w_out", "b_out"):
            mine, sent = getattr(back, name), getattr(network, name)
            assert (mine is None and sent is None) or torch.equal(mine, sent)


# --- the prefix cache


def rule(spec: Any) -> Any:
    extra = {KEY: arrived(packed_request(compiled(spec)))}
    return cache_rule(Fake(extra_args=extra))


def salt(spec: Any, *, user: str | None = None, name: str = "r", outside: bool = False) -> Any:
    return salted(user, rule(spec), request_id=name, shares_outside=outside)


def test_unsteered_requests_keep_their_salt() -> None:
    """A plain request that no longer finds what was cached before trimtab was installed."""
    for extra in (None, {}, {"other": 1}, {KEY: "no plan"}):
        assert cache_rule(Fake(extra_args=extra)) is None
    assert cache_rule(None) is None
    assert answer_key(Fake(sampling_params=Fake(extra_args=None), num_prompt_tokens=1), 9) is None


def test_what_changes_the_prompt_changes_the_salt() -> None:
    """Keys and values of one steering served to another: its answer would be half the other's."""
    salts = [salt(spec) for spec in ("a", "2 a", "b", "a + b", "-a")]
    assert None not in salts
    assert len(set(salts)) == len(salts)
    assert salt("a") == salt("a", name="another request")
    assert len({salt("a"), salt("a", user="u"), salt("a", user="v")}) == 3


def test_an_answers_steering_leaves_the_prompt_shared() -> None:
    """A long prompt computed again for each way to steer its answer."""
    late = {"vectors": [{"id": "a", "apply": {"prompt": False}}]}
    other = {"vectors": [{"id": "b", "apply": {"prompt": False}}]}
    assert salt(late) is None
    assert salt(late, user="u") == "u"
    assert salt(late, outside=True) not in (None, salt(other, outside=True))
    requests = [
        Fake(
            sampling_params=Fake(extra_args={KEY: packed_request(compiled(spec))}),
            num_prompt_tokens=16,
        )
        for spec in (late, other, "a")
    ]
    assert [answer_key(one, 16) for one in requests] == [None, None, None]
    first, second, uniform = (answer_key(one, 32) for one in requests)
    assert first is not None
    assert first != second
    assert uniform is None  # the same text is the same as a prompt's: its salt says it all


def test_a_gate_on_the_whole_prompt_shares_with_nobody() -> None:
    """Two prompts with one beginning, decided differently, share the beginning's keys."""
    gated = SPECS["prompt gate"]
    assert salt(gated, name="one") != salt(gated, name="two")

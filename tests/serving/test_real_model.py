"""The unmodified openai client against the real model: what the documentation promises."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

pytestmark = pytest.mark.slow

HELLO = [{"role": "user", "content": "Describe a rainy day in one sentence."}]


def ask(served, **more):
    fields = {"model": "smollm2", "messages": HELLO, "max_tokens": 24, "temperature": 0} | more
    return served.openai.chat.completions.create(**fields)


def test_steering_changes_the_answer_and_the_receipt_says_how(real_server):
    """Catches 200 OK with unsteered text."""
    plain = ask(real_server)
    assert not hasattr(plain, "steering")
    texts = {plain.choices[0].message.content}
    for scale in (3.0, -3.0):
        spec = {"vectors": [{"id": "optimistic", "scale": scale}]}
        steered = ask(real_server, extra_body={"steering": spec})
        texts.add(steered.choices[0].message.content)
        (layer,) = steered.steering["layers"]
        assert steered.steering["dose"][str(layer)] == pytest.approx(0.3, rel=1e-3)
        assert steered.steering["applied"][0]["id"] == "optimistic"
        n = steered.usage.prompt_tokens + steered.usage.completion_tokens - 1
        assert steered.steering["choices"][0]["steered_tokens"] == n
    assert len(texts) == 3


def test_scale_zero_is_the_unsteered_answer(real_server):
    """Catches a scale of 0 that touches anything: log-probabilities must be equal to the bit."""
    more = {"logprobs": True, "top_logprobs": 3}
    plain = ask(real_server, **more)
    zero = ask(real_server, extra_body={"steering": "0 optimistic"}, **more)
    assert zero.choices[0].logprobs == plain.choices[0].logprobs
    assert zero.steering["choices"][0]["steered_tokens"] == 0


def test_opposite_terms_cancel(real_server):
    """Catches terms that are clipped or rounded one by one."""
    plain = ask(real_server)
    both = ask(real_server, extra_body={"steering": "2 optimistic - 2 optimistic"})
    assert both.choices[0].message.content == plain.choices[0].message.content


def test_streamed_and_whole_answers_are_equal(real_server):
    """Catches text lost between chunks, and a receipt missing from streams."""
    body = {"steering": "2 optimistic - 1 formal"}
    whole = ask(real_server, extra_body=body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(real_server, extra_body=body, **options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    receipts = [c.steering for c in chunks if hasattr(c, "steering")]
    assert len(receipts) == 1
    assert receipts[0]["dose"] == whole.steering["dose"]
    assert chunks[-1].usage == whole.usage


def test_a_seed_reproduces_and_choices_differ(real_server):
    """Catches choices that share a generator, and a seed that depends on the batch."""
    fields = {"temperature": 1.0, "seed": 11, "n": 3}
    first, again = ask(real_server, **fields), ask(real_server, **fields)
    texts = [c.message.content for c in first.choices]
    assert texts == [c.message.content for c in again.choices]
    assert len(set(texts)) == 3
    assert first.usage.completion_tokens <= 72


def test_stop_ends_before_the_string(real_server):
    """Catches a stop string shown, or the wrong finish reason."""
    whole = ask(real_server).choices[0].message.content
    word = whole.split()[4]
    answer = ask(real_server, stop=[word]).choices[0]
    assert answer.message.content == whole[: whole.index(word)]
    assert answer.finish_reason == "stop"


def test_completions_logprobs_and_scoring(real_server):
    """Catches log-probabilities of another distribution than the one sampled from."""
    client = real_server.openai.completions
    text = "The capital of France is"
    answer = client.create(model="smollm2", prompt=text, max_tokens=3, temperature=0, logprobs=2)
    chosen = answer.choices[0]
    assert "Paris" in chosen.text
    top = chosen.logprobs.top_logprobs[0]
    assert math.isclose(max(top.values()), chosen.logprobs.token_logprobs[0], abs_tol=1e-4)
    scored = client.create(
        model="smollm2",
        prompt=text + chosen.text,
        max_tokens=0,
        echo=True,
        logprobs=1,
        temperature=0,
    )
    own = scored.choices[0].logprobs.token_logprobs[-3:]
    assert own == pytest.approx(chosen.logprobs.token_logprobs, abs=1e-3)


def test_metrics_count_steered_tokens(real_server):
    """Catches a counter nobody increments."""
    before = real_server.metric("trimtab_steered_tokens_total")
    answer = ask(real_server, extra_body={"steering": "1 optimistic"})
    after = real_server.metric("trimtab_steered_tokens_total")
    assert after - before == answer.steering["choices"][0]["steered_tokens"] > 0


def test_an_ablated_direction_changes_the_answer_everywhere(real_server):
    """Catches an ablation that is accepted and not applied."""
    plain = ask(real_server)
    answer = ask(real_server, extra_body={"steering": {"ablate": [{"id": "optimistic"}]}})
    assert len(answer.steering["layers"]) == 30
    assert answer.choices[0].message.content != plain.choices[0].message.content


def test_a_gate_that_never_opens_leaves_the_answer_alone(real_server):
    """Catches gates that are read after the layer they gate, or ignored."""
    plain = ask(real_server)
    spec = {
        "vectors": [{"id": "optimistic", "scale": 3.0, "layers": [20]}],
        "when": {"probe": "formal", "above": 1.0, "layer": 10},
    }
    shut = ask(real_server, extra_body={"steering": spec})
    assert shut.choices[0].message.content == plain.choices[0].message.content
    assert shut.steering["choices"][0]["gates"][0]["fired"] == 0.0
    spec["when"]["above"] = 0.0
    open_gate = ask(real_server, extra_body={"steering": spec})
    assert open_gate.steering["choices"][0]["gates"][0]["fired"] == 1.0
    assert open_gate.choices[0].message.content != plain.choices[0].message.content


TWO = {"guidance": [{"classifier": "tone", "target": ["empathetic", "concise"], "steps": 3}]}


def test_guidance_moves_what_its_own_probe_reads(real_server):
    """Catches guidance toward another label, by a probe that reads a later layer's state."""
    spec = {"guidance": [{"classifier": "tone", "target": ["empathetic"], "layers": [13]}]}
    spec["guidance"][0] |= {"dose": 0.12, "over_dose": True}
    more = {"probes": ["late"]}
    late = real_server.store.classifier("tone")
    real_server.store.put_classifier(replace(late, id="late", probe_layer=16))
    read = {}
    for name, steering in (("plain", None), ("guided", spec)):
        body = more | ({} if steering is None else {"steering": steering})
        choice = ask(real_server, extra_body=body).choices[0]
        probe = choice.probes["late"]
        at = probe["labels"].index("empathetic")
        read[name] = sum(row[at] for row in probe["tokens"]) / len(probe["tokens"])
        assert len(probe["tokens"]) == 24
    assert read["guided"] > read["plain"]


def test_guided_requests_say_what_they_did(real_server):
    """Catches 200 OK without guidance, by either way to ask for it."""
    plain = ask(real_server).choices[0].message.content
    answers = [
        ask(real_server, extra_body={"steering": steering})
        for steering in (TWO, "tone/empathetic + tone/concise")
    ]
    for answer in answers:
        (entry,) = answer.steering["applied"]
        assert set(entry["target"]) == {"empathetic", "concise"}
        assert entry["calibrated_for_these_labels"]
        n = answer.usage.prompt_tokens + answer.usage.completion_tokens - 1
        assert answer.steering["choices"][0]["steered_tokens"] == n
        assert answer.choices[0].message.content != plain

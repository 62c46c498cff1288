"""vLLM's own server with the plugin: a real process, the real model, the unmodified OpenAI client.

`teacher` is transformers' own `generate` with a forward hook, so nothing of ours is its own judge.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from trimtab.steering.artifact import ModelRef
from trimtab.steering.model.default import ensure_default_model
from trimtab.steering.model.loading import LoadedModel
from trimtab.steering.model.profile import profile_model
from trimtab.steering.vector import VectorArtifact, to_bytes

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

USER, ADMIN = "user-key-123", "admin-key-123"
MESSAGES = [{"role": "user", "content": "What do people do in a library when it rains outside?"}]
N_TOKENS = 12
LAYERS = (9, 14)


@dataclass
class Plain:
    """A running `vllm serve`."""

    url: str
    client: openai.OpenAI
    http: httpx.Client

    def chat(self, steering: Any = None, **more: Any) -> Any:
        """Ask for a greedy answer, steered by a spec if one is given."""
        return self.client.chat.completions.create(**asked(steering, **more))

    def put(self, name: str, data: bytes, *, key: str = ADMIN) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        return self.http.put(f"/v1/steering/vectors/{name}", content=data, headers=headers)


def asked(steering: Any = None, **more: Any) -> dict[str, Any]:
    fields = {"model": "smollm2", "messages": MESSAGES, "max_tokens": N_TOKENS, "temperature": 0}
    if steering is not None:
        text = steering if isinstance(steering, str) else json.dumps(steering)
        more["extra_body"] = {"vllm_xargs": {"steering": text}}
    return fields | more


def by(name: str, scale: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"vectors": [{"id": name, "scale": scale, **more}]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    folder = tmp_path_factory.mktemp("plain")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = "--enforce-eager --dtype float32 --max-model-len 512 --max-num-seqs 8"
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "TRIMTAB_HOME": str(folder / "home"),
        "TRIMTAB_ADMIN_KEYS": ADMIN,
        "TRIMTAB_MAX_DOSE": "0.8",
        "VLLM_PLUGINS": "trimtab",
    }
    command = [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.launchers.api_server.entry"),
        *("--model", str(ensure_default_model()), "--served-model-name", "smollm2"),
        *("--host", "127.0.0.1", "--port", str(port), "--api-key", USER, ADMIN),
        *options.split(),
    ]
    log = folder / "log.txt"
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=120) as http:
            until_ready(http, server, log)
            with openai.OpenAI(base_url=f"{url}/v1", api_key=USER, max_retries=0) as client:
                yield Plain(url, client, http)
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(timeout=20)


def until_ready(http: httpx.Client, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 240
    while True:
        with contextlib.suppress(httpx.TransportError):
            if http.get("/health").status_code == 200:
                return
        text = log.read_text(errors="replace")[-4000:]
        assert server.poll() is None, f"the server ended:\n{text}"
        assert time.monotonic() < end, f"the server is not ready:\n{text}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def ref(smollm2: LoadedModel) -> ModelRef:
    return profile_model(smollm2.model, model_id="smollm2", tokenizer=smollm2.tokenizer).ref


def vector(name: str, ref: ModelRef, *, seed: int, size: float = 40.0) -> VectorArtifact:
    directions = torch.randn(len(LAYERS), ref.hidden_size, generator=torch.manual_seed(seed))
    directions *= size / directions.norm(dim=-1, keepdim=True)
    return VectorArtifact(
        id=name,
        model=ref,
        layers=LAYERS,
        directions=directions,
        default_layers=LAYERS,
        method="random",
    )


@pytest.fixture(scope="module")
def warm(plain: Plain, ref: ModelRef) -> VectorArtifact:
    """A vector put over HTTP."""
    made = vector("warm", ref, seed=1)
    answer = plain.put("warm", to_bytes(made))
    assert answer.status_code == 201, answer.text
    return made


@pytest.fixture(scope="module")
def teacher(smollm2: LoadedModel) -> Callable[..., str]:
    """Return `text(vector=None, scale=1.0)`: the model's greedy answer under a plain hook."""

    def text(steered_by: VectorArtifact | None = None, *, scale: float = 1.0) -> str:
        hooks = []
        for layer in steered_by.layers if steered_by is not None else ():
            row = steered_by.row(layer) * scale

            def add(module: Any, args: Any, output: Any, row: torch.Tensor = row) -> Any:
                if isinstance(output, tuple):
                    return (output[0] + row, *output[1:])
                return output + row

            hooks.append(smollm2.model.model.layers[layer].register_forward_hook(add))
        try:
            ids = smollm2.tokenizer.apply_chat_template(
                MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                made = smollm2.model.generate(**ids, do_sample=False, max_new_tokens=N_TOKENS)
        finally:
            for hook in hooks:
                hook.remove()
        new = made[0, ids["input_ids"].shape[1] :]
        return str(smollm2.tokenizer.decode(new, skip_special_tokens=True))

    return text


def content(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def receipt(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.kv_transfer_params["steering"]
    return found


def test_steered_answers_are_the_teachers_and_leave_others_alone(
    plain: Plain, warm: VectorArtifact, teacher: Callable[..., str]
) -> None:
    """Catches an op that is not reached, and keys and values that leak out of the prefix cache."""
    assert content(plain.chat()) == teacher()
    steered = content(plain.chat(by("warm")))
    assert steered == teacher(warm)
    assert steered != teacher()
    assert content(plain.chat(by("warm"))) == steered
    assert content(plain.chat(by("warm", -1.0))) == teacher(warm, scale=-1.0)
    assert content(plain.chat()) == teacher()


def test_the_string_form_is_read(plain: Plain, warm: VectorArtifact) -> None:
    """Catches a reader that takes JSON only."""
    assert content(plain.chat("1.0 warm")) == content(plain.chat(by("warm")))


def test_a_stream_says_the_same(plain: Plain, warm: VectorArtifact) -> None:
    """Catches a streamed answer that is steered otherwise, or not at all."""
    chunks = plain.chat(by("warm"), stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == content(plain.chat(by("warm")))


def test_the_receipt_says_what_was_applied(plain: Plain, warm: VectorArtifact) -> None:
    """Catches an answer that doesn't say that, or how strongly, it was steered."""
    answer = plain.chat(by("warm"))
    found = receipt(answer)
    assert found["applied"][0]["id"] == "warm"
    assert found["layers"] == list(LAYERS)
    n_run = answer.usage.prompt_tokens + answer.usage.completion_tokens - 1
    assert found["choices"] == [{"index": 0, "steered_tokens": n_run, "gates": []}]
    assert getattr(plain.chat(), "kv_transfer_params", None) is None


def test_every_choice_is_steered_and_accounted_for(plain: Plain, warm: VectorArtifact) -> None:
    """Catches choices that share an inbox, or of which only the last is in the receipt."""
    answers = [plain.chat(by("warm"), n=2, temperature=1, seed=4) for _ in range(2)]
    first, again = ([c.message.content for c in answer.choices] for answer in answers)
    assert first == again
    assert [c["index"] for c in receipt(answers[0])["choices"]] == [0, 1]
    assert all(c["steered_tokens"] > 0 for c in receipt(answers[0])["choices"])


def test_a_scale_of_0_changes_nothing_and_says_so(
    plain: Plain, warm: VectorArtifact, teacher: Callable[..., str]
) -> None:
    """Catches a plan without parts that waits for a report nobody sends."""
    answer = plain.chat(by("warm", 0.0))
    assert content(answer) == teacher()
    assert receipt(answer)["choices"][0]["steered_tokens"] == 0


def test_completions_are_steered(plain: Plain, warm: VectorArtifact) -> None:
    """Catches a guard on one route only."""
    fields = {"model": "smollm2", "prompt": "The old house", "max_tokens": 8, "temperature": 0}
    extra = asked(by("warm"))["extra_body"]
    bare = plain.client.completions.create(**fields)
    steered = plain.client.completions.create(**fields, extra_body=extra)
    assert steered.choices[0].text != bare.choices[0].text
    assert receipt(steered)["choices"][0]["steered_tokens"] > 0


@pytest.mark.parametrize(
    ("xargs", "param"),
    [
        ({"steering": json.dumps(by("cold"))}, "vllm_xargs.steering.vectors[0].id"),
        ({"steering": json.dumps(by("warm", 90.0))}, "vllm_xargs.steering.vectors[0].scale"),
        ({"steering": '{"vectors": [], "spread": 1}'}, "vllm_xargs.steering.spread"),
        ({"steering": 3}, "vllm_xargs.steering"),
        ({"steering_preset": "nobody"}, "vllm_xargs.steering_preset"),
        ({"trimtab": "x"}, "vllm_xargs.trimtab"),
    ],
    ids=["unknown vector", "dose", "unknown field", "number", "preset", "inner key"],
)
def test_what_is_wrong_is_refused_by_path(
    plain: Plain, warm: VectorArtifact, xargs: dict[str, Any], param: str
) -> None:
    """Catches a 200 with unsteered text, or a 500 for a client's own mistake."""
    with pytest.raises(openai.BadRequestError) as caught:
        plain.chat(extra_body={"vllm_xargs": xargs})
    assert caught.value.param == param


def test_a_stream_that_cannot_be_steered_has_no_text(plain: Plain, warm: VectorArtifact) -> None:
    """Catches a stream that goes on unsteered; vLLM has sent its 200 by then."""
    chunks = plain.chat(by("cold"), stream=True)
    seen: list[Any] = []
    with pytest.raises(openai.APIError, match="cold"):
        seen.extend(chunks)
    assert not any(chunk.choices[0].delta.content for chunk in seen)


@pytest.mark.parametrize(
    "more",
    [
        {"extra_body": {"steering": by("warm")}},
        {"extra_body": {"vllm_xargs": {"steering": "warm"}, "use_beam_search": True}, "n": 2},
    ],
    ids=["own field", "beam search"],
)
def test_what_vllm_would_ignore_is_refused(
    plain: Plain, warm: VectorArtifact, more: dict[str, Any]
) -> None:
    """Catches unsteered text for a client that asked for steering in a way vLLM drops."""
    with pytest.raises(openai.BadRequestError):
        plain.chat(**more)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4, "steering": "warm"}),
        ("/cohere/v2/chat", {"messages": MESSAGES, "vllm_xargs": {"steering": "warm"}}),
    ],
)
def test_routes_that_would_not_hear_refuse(plain: Plain, path: str, body: dict[str, Any]) -> None:
    """Catches the same on routes with bodies of another kind."""
    headers = {"authorization": f"Bearer {USER}"}
    answer = plain.http.post(path, json={"model": "smollm2", **body}, headers=headers)
    assert answer.status_code == 400
    assert "steering" in answer.json()["error"]["param"]


def test_other_apis_of_vllm_steer_too(plain: Plain, warm: VectorArtifact) -> None:
    """Catches a guard that stands on the way of OpenAI's routes only."""
    headers = {"authorization": f"Bearer {USER}"}
    body = asked() | {"vllm_xargs": {"steering": "warm"}}
    answer = plain.http.post("/v1/messages", json=body, headers=headers).json()
    assert answer["content"][0]["text"] == content(plain.chat(by("warm")))


def test_vectors_change_over_http_at_once(plain: Plain, warm: VectorArtifact, ref: Any) -> None:
    """Catches a second store, or a compiled plan that outlives its vector."""
    assert plain.put("passing", to_bytes(vector("passing", ref, seed=2))).status_code == 201
    before = content(plain.chat(by("passing")))
    assert plain.put("passing", to_bytes(vector("passing", ref, seed=3))).status_code == 200
    after = content(plain.chat(by("passing")))
    assert before != after
    admin = {"authorization": f"Bearer {ADMIN}"}
    assert plain.http.delete("/v1/steering/vectors/passing", headers=admin).status_code == 200
    with pytest.raises(openai.BadRequestError, match="passing"):
        plain.chat(by("passing"))


def test_a_preset_steers_and_joins(plain: Plain, warm: VectorArtifact) -> None:
    """Catches a preset that is stored and never applied."""
    admin = {"authorization": f"Bearer {ADMIN}"}
    put = plain.http.put("/v1/steering/presets/mild", json=by("warm", 0.5), headers=admin)
    assert put.status_code == 201, put.text
    whole = content(plain.chat(by("warm", 1.0)))
    half = {"steering_preset": "mild"}
    joined = half | {"steering": "0.5 warm"}
    assert content(plain.chat(extra_body={"vllm_xargs": joined})) == whole
    answer = plain.chat(extra_body={"vllm_xargs": half})
    assert receipt(answer)["applied"][0]["scale"] == 0.5


@pytest.mark.parametrize(
    ("key", "read", "write"), [(None, 401, 401), (USER, 200, 403), (ADMIN, 200, 201)]
)
def test_keys_guard_our_routes(
    plain: Plain, warm: VectorArtifact, ref: ModelRef, key: str | None, read: int, write: int
) -> None:
    """Catches routes that lie outside vLLM's own guard, or that let any user change vectors."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    for route in ("vectors", "methods", "concepts", "similarities"):
        answer = plain.http.get(f"/v1/steering/{route}", headers=headers)
        assert answer.status_code == read, route
    name = f"/v1/steering/vectors/by-{key}"
    data = to_bytes(vector("x", ref, seed=5))
    assert plain.http.put(name, content=data, headers=headers).status_code == write


def test_errors_below_our_path_are_ours(plain: Plain, warm: VectorArtifact) -> None:
    """Catches vLLM's handlers, which would drop the JSON path."""
    headers = {"authorization": f"Bearer {USER}"}
    answer = plain.http.get("/v1/steering/vectors/cold", headers=headers)
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "id"

"""An explanation on its way through HTTP: progress, result, refusals, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from running_server import NAME, Served, running
from serving_fakes import FakeEngine, toy_vector
from toy_chat import toy_chat

from trimtab.serving.engines.transformers.engine import TransformersEngine
from trimtab.serving.settings import ServerSettings
from trimtab.steering.store import Store
from trimtab.ui.page.api import Api
from trimtab.ui.page.conversation import Answer, Conversation, Piece, Turn
from trimtab.ui.page.run_settings import read_settings
from trimtab.ui.page.visitor import Visitors
from trimtab.ui.page.why_question import STEERED, TYPED, How, question_of
from trimtab.ui.page.why_run import Explaining, Explanation
from trimtab.ui.page.why_tab import WhyTab

PROMPT = "How long is a piece of string? " * 4
# Much longer than any test waits: only an end that is asked for ends it.
ENDLESS = How("shapley_sampling", {"orders": "1024"})
QUICK = How("integrated_gradients", {"points": "5"})


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start a server over a toy model, or over another engine: `serve(attribution_max_queue=1)`."""
    with ExitStack() as stack:

        def start(*, engine: Any = None, **settings: Any) -> Served:
            loaded = toy_chat()
            chosen = ServerSettings(
                **{"served_model_name": NAME, "attribution_max_tokens": 10**9} | settings
            )
            served = stack.enter_context(
                running(
                    engine or TransformersEngine(lambda: loaded),
                    Store(tmp_path / "store"),
                    settings=chosen,
                )
            )
            info = served.engine.info
            size = 0.5 * float(info.hidden_norms.min())
            served.store.put_vector(toy_vector("kind", ref=info.model, size=size, seed=1))
            return served

        yield start


@asynccontextmanager
async def api_of(served: Served) -> AsyncIterator[Api]:
    api = Api(served.url)
    try:
        yield api
    finally:
        await api.close()


def explanation(how: How, *, is_compared: bool = False) -> Explanation:
    settings = read_settings({"prompt": PROMPT, "vectors": [{"id": "kind", "scale": 1.0}]})
    said = [Answer([Piece(text)], finish="stop") for text in ("no", "yes")]
    talk = Conversation(turns=[Turn(settings, *said)])
    return Explanation(question_of(STEERED, talk, is_compared=is_compared), how)


def n_jobs(served: Served) -> int:
    return len(served.app.state.server.attributions)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def outcome(api: Api, one: Explanation, explaining: Explaining | None = None) -> list[Any]:
    """Run it; what was shown on the way: (results so far, progress)."""
    return [
        (len(found.results), found.progress)
        async for found in (explaining or Explaining()).run(api, one, model=NAME)
    ]


def ran(served: Served, one: Explanation) -> list[Any]:
    async def play() -> list[Any]:
        async with api_of(served) as api:
            return await outcome(api, one)

    return asyncio.run(play())


def test_both_sides_are_asked_and_only_one_is_steered(serve):
    """Catches a difference of one thing with itself, or one whose sign is turned."""
    served = serve()
    one = explanation(QUICK, is_compared=True)
    shown = ran(served, one)
    assert shown[-1] == (2, {})
    assert one.error is None
    steered, plain = one.results
    assert steered["steering"]["layers"]
    assert "steering" not in plain
    # The server's own words, asked for without the page.
    alone = served.http.post(
        "/v1/attributions",
        json={
            "model": NAME,
            "messages": [{"role": "user", "content": PROMPT}],
            "target": "yes",
            "method": "integrated_gradients",
            "params": {"points": 5},
        },
    ).json()
    assert plain["input"] == alone["input"]
    assert steered["input"] != alone["input"]


def test_progress_is_the_servers(serve):
    """Catches a bar that stands still until the end."""
    served, told = serve(), []

    async def play() -> None:
        async with api_of(served) as api:
            explaining = Explaining()
            async for found in explaining.run(api, explanation(ENDLESS), model=NAME):
                told.append(found.progress)
                if len({step["done"] for step in told if step.get("total")}) >= 3:
                    explaining.stop()

    asyncio.run(play())
    done = [step["done"] for step in told if step.get("total")]
    assert done == sorted(done)
    assert 0 < done[-1] < told[-1]["total"]


def test_cancelling_takes_the_job_from_the_server(serve):
    """Catches a button that only hides what goes on."""
    served, one, explaining = serve(), explanation(ENDLESS, is_compared=True), Explaining()

    async def play() -> None:
        async with api_of(served) as api:
            run = asyncio.create_task(outcome(api, one, explaining))
            await until(lambda: one.progress.get("done", 0) > 0)
            assert n_jobs(served) == 1  # the other side waits here, not in the server's queue
            explaining.stop()
            await asyncio.wait_for(run, 20)
            await until(lambda: n_jobs(served) == 0)

    asyncio.run(play())
    assert one.is_cancelled
    assert not one.results
    assert one.error is None


def test_a_new_explanation_takes_the_place_of_the_old_one(serve):
    """Catches an old result that is shown after a new one, and two jobs of one visitor."""
    served, old, new = serve(), explanation(ENDLESS), explanation(QUICK)
    explaining, late = Explaining(), []

    async def play() -> None:
        async with api_of(served) as api:

            async def first() -> None:
                async for _ in explaining.run(api, old, model=NAME):
                    late.append(bool(new.results))

            run = asyncio.create_task(first())
            await until(lambda: old.progress.get("done", 0) > 0)
            await outcome(api, new, explaining)
            await asyncio.wait_for(run, 20)
            await until(lambda: n_jobs(served) == 0)

    asyncio.run(play())
    assert new.results
    assert not old.results
    assert late
    assert not any(late)


def test_what_was_cleared_says_nothing_more(serve):
    """Catches "Cancelled." of an old explanation in the place of a new question's refusal."""
    served, one, explaining, late = serve(), explanation(ENDLESS), Explaining(), []

    async def play() -> None:
        async with api_of(served) as api:

            async def read() -> None:
                async for found in explaining.run(api, one, model=NAME):
                    late.append(found.is_cancelled)

            run = asyncio.create_task(read())
            await until(lambda: one.progress.get("done", 0) > 0)
            assert explaining.is_latest(one)
            explaining.clear()
            await asyncio.wait_for(run, 20)
            await until(lambda: n_jobs(served) == 0)

    asyncio.run(play())
    assert not explaining.is_latest(one)
    assert late
    assert not any(late)


def test_stopping_before_the_first_step_ends_it(serve):
    """Catches a click that is followed by another at once, and waits for ever."""
    served, one, explaining = serve(), explanation(ENDLESS), Explaining()

    async def play() -> None:
        async with api_of(served) as api:
            run = asyncio.create_task(outcome(api, one, explaining))
            await asyncio.sleep(0)  # its task is made, and has not run yet
            explaining.stop()
            await asyncio.wait_for(run, 20)

    asyncio.run(play())
    assert one.is_cancelled
    assert n_jobs(served) == 0


def test_a_stop_is_heard_as_soon_as_there_is_something_to_stop(serve):
    """Catches a Cancel that does nothing between the press and the request."""
    served = serve()

    async def play() -> list[str]:
        async with api_of(served) as api:
            visitors = Visitors(api)
            with gr.Blocks(), gr.Tab("Why") as tab:
                why = WhyTab(visitors, tab)
            who = SimpleNamespace(session_hash="me")
            notices = []
            texts = (PROMPT, "yes", "")
            asked = (TYPED, False, ENDLESS.method, "orders=1024", False, *texts)
            async with asyncio.timeout(20):
                async for notice, _, _ in why._explained(who, *asked):
                    if not notices:
                        await why._cancelled(who)
                    notices.append(notice)
            await until(lambda: n_jobs(served) == 0)
        return notices

    first, *_, last = asyncio.run(play())
    assert not first
    assert "Cancelled." in last


def test_a_reader_who_goes_away_ends_the_job(serve):
    """Catches a job for a page that nobody looks at."""
    served, one = serve(), explanation(ENDLESS)

    async def play() -> None:
        async with api_of(served) as api:
            shown = Explaining().run(api, one, model=NAME)
            while not one.progress.get("done", 0):
                await anext(shown)
            await shown.aclose()
            await until(lambda: n_jobs(served) == 0)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("settings", "how", "said"),
    [
        ({"attribution_max_tokens": 100}, QUICK, "this server allows 100. Ask for fewer points"),
        ({}, How("integrated_gradient"), "Known: "),
        ({}, How("kernel_shap", {"sample": "3"}), "Did you mean 'samples'?"),
        ({"attnlrp": False}, How("attnlrp"), "use 'kernel_shap'"),
        ({"engine": FakeEngine()}, How(), "serve the model with --engine transformers"),
    ],
)
def test_refusals_are_the_servers_own_sentences(serve, settings, how, said):
    """Catches a refusal that is swallowed, or shown as a number."""
    one = explanation(how)
    ran(serve(**settings), one)
    assert said in (one.error or "")
    assert not one.results


def test_a_full_queue_says_so(serve):
    """Catches a visitor who is left waiting where the server has refused."""
    served, first, second = serve(attribution_max_queue=1), explanation(ENDLESS), explanation(QUICK)

    async def play() -> None:
        async with api_of(served) as api:
            explaining = Explaining()
            run = asyncio.create_task(outcome(api, first, explaining))
            await until(lambda: first.progress.get("done", 0) > 0)
            await outcome(api, second)
            explaining.stop()
            await run

    asyncio.run(play())
    assert "try again shortly" in (second.error or "")


def test_an_error_on_the_way_is_told(serve, monkeypatch):
    """Catches a stream whose error event is taken for progress, or that ends without a word."""
    served, one = serve(), explanation(ENDLESS)

    async def play() -> None:
        async with api_of(served) as api:
            run = asyncio.create_task(outcome(api, one))
            await until(lambda: one.progress.get("done", 0) > 0)
            await api.delete(f"/v1/attributions/{one.progress['id']}")
            await asyncio.wait_for(run, 20)

    asyncio.run(play())
    assert one.error == "The attribution was cancelled."
    assert not one.is_cancelled


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"object": "attribution", "input": []}, "no account of the steering"),
        ({"object": "attribution.progress"}, "without its result"),
    ],
)
def test_a_server_that_is_not_ours_is_found_out(event, said):
    """Catches an unsteered attribution that is shown as a steered one."""

    class Other(Api):
        async def stream(self, path: str, body: dict[str, Any]) -> Any:
            yield event

    one = explanation(QUICK)
    asyncio.run(outcome(Other("http://127.0.0.1:1"), one))
    assert said in (one.error or "")
    assert not one.results

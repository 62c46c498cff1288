"""`trimtab serve`: the server, with what it chose and why, until Ctrl-C."""

from __future__ import annotations

import ipaddress
import json
import multiprocessing
import os
import shlex
import socket
import sys
from typing import TYPE_CHECKING, Any

import click

from trimtab.serving.settings import ServerSettings
from trimtab.ui.options import loading_options, model_argument
from trimtab.ui.served_engine import ENGINES, engine_of
from trimtab.ui.setting_options import setting_options, settings_given
from trimtab.ui.terminal import say, styled
from trimtab.ui.vllm_flags import FLAGS, ServeCommand

if TYPE_CHECKING:
    from fastapi import FastAPI

    from trimtab.serving.engines.base import Engine
    from trimtab.ui.page.mount import Page

# Settings whose options need more than a field says: keys from the environment, no limit at all.
_BY_HAND = ("served_model_name", "api_keys", "admin_keys", "max_dose")


@click.command(
    cls=ServeCommand,
    examples=(
        "trimtab serve",
        "trimtab serve smollm2 --port 8080 --max-concurrent 16",
        "trimtab serve smollm2 --engine vllm --enforce-eager",
        "TRIMTAB_API_KEYS=a-long-secret trimtab serve --host 0.0.0.0",
    ),
)
@model_argument
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default=ENGINES[0],
    show_default=True,
    help="What runs the model. vllm takes vLLM's own flags too, after MODEL.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    default=8000,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port to listen on; 0 takes a free one.",
)
@loading_options
@click.option(
    "--max-concurrent",
    default=32,
    show_default=True,
    type=click.IntRange(1),
    help="Sequences that run at once.",
)
@click.option(
    "--max-queue",
    default=256,
    show_default=True,
    type=click.IntRange(0),
    help="Sequences that may wait; more are refused with 429.",
)
@click.option(
    "--max-slots",
    default=256,
    show_default=True,
    type=click.IntRange(1),
    help="Differently steered requests alive at once.",
)
@click.option(
    "--cache-gb",
    type=click.FloatRange(0, min_open=True),
    help="Memory for keys and values, GiB.  [default: 30 % of what is free]",
)
@click.option(
    "--max-dose",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Largest relative dose |change| / |h| at a layer that a request may ask for.",
)
@click.option("--any-dose", is_flag=True, help="Allow any dose.")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    metavar="KEY",
    help="Bearer key that may use /v1; repeatable. Others on this machine can read command "
    "lines: prefer TRIMTAB_API_KEYS, a list with commas.",
)
@click.option(
    "--admin-key",
    "admin_keys",
    multiple=True,
    metavar="KEY",
    help="Bearer key that may also change vectors, classifiers and presets; repeatable. Also "
    "TRIMTAB_ADMIN_KEYS.",
)
@click.option(
    "--page/--no-page",
    "has_page",
    default=True,
    show_default=True,
    help="Show the web page under /ui; needs trimtab[ui].",
)
@click.option("--served-name", help="Name of the model on the wire.  [default: the model's own]")
@setting_options(ServerSettings, but=_BY_HAND)
@click.option(
    "--insecure-open",
    is_flag=True,
    help="Serve other machines without any key.",
)
def serve(model: str, **options: Any) -> None:
    """Serve MODEL with an OpenAI-compatible API whose requests may each be steered.

    MODEL is a local folder, a Hugging Face id, or smollm2, which works out of the box.
    """
    settings = _settings(options)
    _check_open(options["host"], settings, is_allowed=options["insecure_open"])
    flags = click.get_current_context().meta.get(FLAGS, [])
    engine = engine_of(model, options, vllm_flags=flags)
    from trimtab.ui.local_server import listening_socket

    listening = listening_socket(options["host"], options["port"])
    say(f"Loading {model} ...")
    with listening:
        _serve(model, engine, listening, settings=settings, has_page=options["has_page"])


def _settings(options: dict[str, Any]) -> ServerSettings:
    """Return the app's settings; whatever pydantic refuses is wrong usage."""
    from pydantic import ValidationError

    given = click.get_current_context().get_parameter_source("max_dose")
    if options["any_dose"] and given is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--any-dose and --max-dose exclude each other; give one of them.")
    try:
        return ServerSettings(
            served_model_name=options["served_name"],
            api_keys=_keys(options["api_keys"], variable="TRIMTAB_API_KEYS"),
            admin_keys=_keys(options["admin_keys"], variable="TRIMTAB_ADMIN_KEYS"),
            max_dose=None if options["any_dose"] else options["max_dose"],
            **settings_given(ServerSettings, options, but=_BY_HAND),
        )
    except ValidationError as error:
        # Never the input: it may be a key.
        first = error.errors(include_url=False, include_input=False)[0]
        raise click.UsageError(f"{first['loc'][0]}: {first['msg']}.") from None


def _keys(given: tuple[str, ...], *, variable: str) -> tuple[str, ...]:
    named = [key.strip() for key in os.environ.get(variable, "").split(",")]
    return (*given, *(key for key in named if key))


def _check_open(host: str, settings: ServerSettings, *, is_allowed: bool) -> None:
    if _is_loopback(host) or settings.has_keys or is_allowed:
        return
    raise click.UsageError(
        f"--host {host} lets other machines in, and no key is set. Set TRIMTAB_API_KEYS (or "
        "--api-key), keep --host 127.0.0.1, or give --insecure-open if a firewall guards it."
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _serve(
    model: str,
    engine: Engine,
    listening: socket.socket,
    *,
    settings: ServerSettings,
    has_page: bool,
) -> None:
    import uvicorn

    from trimtab.serving.app import create_app
    from trimtab.ui.server_log import log_to_stderr, quiet_start
    from trimtab.ui.stores import store_of

    quiet_start()
    log_to_stderr()
    store = store_of(model)
    failures: list[BaseException] = []

    class Server(uvicorn.Server):
        """Says what Ctrl-C does; the second one does not wait."""

        is_loaded = False

        def handle_exit(self, sig: int, frame: Any) -> None:
            # While loading nothing is lost, and the loading thread could not be told to stop.
            if self.should_exit or not self.is_loaded:
                say("Stopped at once." if self.is_loaded else "Stopped while loading.")
                sys.stdout.flush()
                for child in multiprocessing.active_children():
                    child.terminate()
                os._exit(130 if self.is_loaded else 0)
            say("Stopping; Ctrl-C again does not wait for running requests.")
            if page is not None:
                page.hang_up()
            self.should_exit = True

    def ready() -> None:
        server.is_loaded = True
        _say_ready(engine, store, settings=settings, listening=listening, page=page)

    def failed(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(engine, store, settings=settings, on_ready=ready, on_failed=failed)
    page = _page(app, listening) if has_page else None
    server = Server(
        uvicorn.Config(
            page or app,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=30,
            server_header=False,
        )
    )
    server.run(sockets=[listening])
    if failures:
        raise failures[0]
    say("Stopped.")


def _page(app: FastAPI, listening: socket.socket) -> Page | None:
    """Return the app with the page around it, or None with a line that says why not."""
    from trimtab.ui.page.mount import NoPageError, Page, check_installed

    try:
        check_installed()
    except NoPageError as error:
        _fact("no page", error.message)
        return None
    return Page(app, url=_url(listening))


def _say_ready(
    engine: Any,
    store: Any,
    *,
    settings: ServerSettings,
    listening: socket.socket,
    page: Page | None,
) -> None:
    for name, sentence in engine.info.choices.items():
        _fact(name, sentence)
    vectors = [vector.id for vector in store.vectors()]
    _fact("vectors", ", ".join(vectors) or "none yet: trimtab vectors build")
    classifiers = [f"{one.id} ({', '.join(one.labels)})" for one in store.classifiers()]
    if classifiers:
        _fact("classifiers", ", ".join(classifiers))
    for file, problem in store.problems.items():
        _fact("NOT READ", f"{file}: {problem}")
    dose = "any" if settings.max_dose is None else f"up to {settings.max_dose:g} |h| a layer"
    _fact("dose", dose)
    if settings.log_generations is not None:
        _fact("log", f"prompts and answers, to {settings.log_generations}")
    url = _url(listening)
    shown = "" if page is None else f"   page {url}/ui"
    say(
        styled(f"Ready: {url}/v1", "bold", stream=sys.stderr)
        + f"{shown}   docs {url}/docs   Ctrl-C stops"
    )
    say(_curl(url, settings.served_model_name or engine.info.model.id, vectors, settings))


def _fact(name: str, sentence: str) -> None:
    say(f"  {styled(f'{name:<11}', 'dim', stream=sys.stderr)} {sentence}")


def _url(listening: socket.socket) -> str:
    """Return an address that can be opened on this machine."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _curl(url: str, model: str, vectors: list[str], settings: ServerSettings) -> str:
    """Return one line that can be pasted into a shell."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "How will my first day at work go?"}],
        "max_tokens": 60,
    }
    if vectors:
        body["steering"] = f"1.0 {vectors[0]}"
    key = " -H 'authorization: Bearer YOUR_KEY'" if settings.has_keys else ""
    return (
        f"curl {url}/v1/chat/completions -H 'content-type: application/json'{key} "
        f"-d {shlex.quote(json.dumps(body))}"
    )

"""`trimtab chat`: a conversation in the terminal whose steering changes as you talk."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from trimtab.steering.errors import TrimtabError
from trimtab.ui.client import Client
from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import loading_options, model_argument
from trimtab.ui.receipt_line import receipt_line
from trimtab.ui.terminal import next_steps, out, say, styled

if TYPE_CHECKING:
    from collections.abc import Callable

HELP = """/steer EXPR   steer from here on, such as: /steer 1.0 optimistic - 0.5 formal,
             or toward a classifier's labels: /steer tone/empathetic - tone/casual
/off          stop steering
/vectors      what there is to steer with
/new          forget the conversation, keep the steering
/help         this list
/quit         leave (also Ctrl-D)"""


@click.command(
    cls=HelpfulCommand,
    examples=(
        "trimtab chat",
        'trimtab chat --steer "1.0 optimistic"',
        "trimtab chat --url http://127.0.0.1:8000",
        "echo 'How will my first day go?' | trimtab chat --steer \"-1.0 optimistic\"",
    ),
)
@model_argument
@click.option("--url", help="A running server; without it the model is served in this process.")
@click.option("--steer", metavar="EXPR", help='Steering to begin with, such as "1.0 optimistic".')
@click.option("--preset", metavar="NAME", help="A preset to talk to.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option(
    "--max-tokens", default=256, show_default=True, type=click.IntRange(1), help="Longest answer."
)
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 2),
    help="0 always takes the likeliest token.",
)
@click.option("--api-key", envvar="TRIMTAB_API_KEY", help="Key of the server at --url.")
@loading_options
def chat(
    model: str,
    url: str | None,
    steer: str | None,
    preset: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    api_key: str | None,
    device: str,
    dtype: str,
) -> None:
    """Chat with MODEL in the terminal; /steer changes its steering, /help lists the rest.

    Lines piped in are taken as turns, one a line, and only the answers are printed.
    """
    source = click.get_current_context().get_parameter_source("model")
    if url is not None and source is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("Give MODEL or --url, not both: the server has its own model.")
    with _client(model, url=url, key=api_key, device=device, dtype=dtype) as client:
        served = client.served_model()
        talk = Talk(
            client,
            model=f"{served}:{preset}" if preset else served,
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
        )
        if preset:
            client.get(f"/v1/models/{talk.model}")
        if steer:
            talk.steer(steer)
        if sys.stdin.isatty():
            say(f"Talking to {talk.model}. /help lists the commands, Ctrl-D leaves.")
        for line in _lines():
            if not _turn(talk, line):
                break
    if sys.stdin.isatty():
        next_steps(f"trimtab serve {shlex.quote(model)}", "trimtab vectors list")


class Talk:
    """A conversation with one server.

    Args:
        client: the server.
        model: name on the wire.
        system: system message, or None.
        max_tokens, temperature: of every answer.
    """

    def __init__(
        self,
        client: Client,
        *,
        model: str,
        system: str | None,
        max_tokens: int,
        temperature: float,
    ) -> None:
        self.client = client
        self.model = model
        self.steering: str | None = None
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)
        self._max_tokens = max_tokens
        self._temperature = temperature

    def answer(self, text: str) -> None:
        """Stream the answer to a turn. A turn that fails is forgotten."""
        self._messages.append({"role": "user", "content": text})
        said = ""
        try:
            for piece in self.client.chat(
                self._messages,
                model=self.model,
                steering=self.steering,
                max_tokens=self._max_tokens,
                temperature=self._temperature,
            ):
                said += piece.text
                out(piece.text, end="")
                if piece.receipt and sys.stdin.isatty():
                    say()
                    say(styled(receipt_line(piece.receipt), "dim", stream=sys.stderr))
        except TrimtabError:
            self._messages.pop()
            raise
        except KeyboardInterrupt:
            say(" [stopped]")
        out()
        self._messages.append({"role": "assistant", "content": said or "..."})

    def steer(self, expression: str) -> None:
        """Steer from here on, after the server has checked the expression.

        Raises:
            ServerError: it cannot be honoured; the steering stays as it was.
        """
        report = self.client.post(
            "/v1/steering/check", {"model": self.model, "steering": expression}
        )
        self.steering = expression
        say(f"Steering: {receipt_line(report)}")

    def stop_steering(self) -> None:
        """Go on unsteered."""
        self.steering = None
        say("Steering is off." if ":" not in self.model else "Only the preset steers now.")

    def forget(self) -> None:
        """Begin the conversation anew."""
        self._messages = list(self._opening)
        say("A new conversation.")

    def list_vectors(self) -> None:
        """Print what there is to steer with."""
        cards = self.client.get("/v1/steering/vectors")["data"]
        for card in cards:
            out(f"{card['id']:<20} {card['method']:<12} {card['description']}".rstrip())
        if not cards:
            say("No vectors yet. Build one: trimtab vectors build --concept optimistic")


def _turn(talk: Talk, line: str) -> bool:
    """Take one line; return False to leave."""
    line = line.strip()
    if line in ("/quit", "/exit"):
        return False
    if not line:
        return True
    try:
        _do(talk, line)
    except TrimtabError as error:
        # In a script an answer that is not steered as asked must not look like one that is.
        if not sys.stdin.isatty():
            raise
        say(f"{styled('Error:', 'red', stream=sys.stderr)} {error.message}")
    return True


def _do(talk: Talk, line: str) -> None:
    if not line.startswith("/"):
        talk.answer(line)
        return
    name, _, rest = line.partition(" ")
    plain: dict[str, Callable[[], None]] = {
        "/off": talk.stop_steering,
        "/vectors": talk.list_vectors,
        "/new": talk.forget,
        "/help": lambda: say(HELP),
    }
    if name == "/steer" and rest.strip():
        talk.steer(rest.strip())
    elif name in plain and not rest.strip():
        plain[name]()
    else:
        raise TrimtabError(f"{line[:80]!r} is no command here.\n{HELP}")


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        # Not `yield from`: leaving it early would close stdin.
        for line in sys.stdin:  # noqa: UP028
            yield line
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() its history and line editing
    while True:
        try:
            yield input("> ")
        except EOFError:
            say()
            return


@contextmanager
def _client(
    model: str, *, url: str | None, key: str | None, device: str, dtype: str
) -> Iterator[Client]:
    if url is not None:
        yield Client(url, key=key)
        return
    from trimtab.ui.local_server import local_server

    say(f"Loading {model} ...")
    with local_server(model, device=device, dtype=dtype) as server:
        yield Client(server.url)

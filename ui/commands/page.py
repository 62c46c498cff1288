"""`trimtab ui`: the page alone, for a server that runs elsewhere."""

from __future__ import annotations

import os
from typing import Any

import click

from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.terminal import say, styled


@click.command(
    "ui",
    cls=HelpfulCommand,
    examples=(
        "trimtab ui",
        "trimtab ui --server http://127.0.0.1:8000 --port 7860",
    ),
)
@click.option(
    "--server",
    default="http://127.0.0.1:8000",
    show_default=True,
    metavar="URL",
    help="The server to talk to; any engine will do.",
)
@click.option(
    "--api-key",
    metavar="KEY",
    help="The server's key, which all who open this page then use. Also TRIMTAB_API_KEY. Without "
    "it the page asks each of them.",
)
@click.option(
    "--port",
    default=7860,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port to listen on, on this machine only; 0 takes a free one.",
)
def ui(server: str, api_key: str | None, port: int) -> None:
    """Open the web page for a running server: steer, compare, see why.

    `trimtab serve` shows the same page itself, under /ui.
    """
    from trimtab.ui.local_server import listening_socket
    from trimtab.ui.page.mount import PATH, check_installed

    check_installed()
    listening = listening_socket("127.0.0.1", port)
    with listening:
        import sys

        import uvicorn

        from trimtab.ui.page.api import Api
        from trimtab.ui.page.app import page_app
        from trimtab.ui.page.hang_up import HangUp

        class Server(uvicorn.Server):
            """Does not wait for open pages when Ctrl-C is pressed."""

            def handle_exit(self, sig: int, frame: Any) -> None:
                page.hang_up()
                self.should_exit = True

        api = Api(server, key=api_key or os.environ.get("TRIMTAB_API_KEY") or None)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}{PATH}"
        say(styled(f"Page: {url}", "bold", stream=sys.stderr) + f"   for {api.url}   Ctrl-C stops")
        page = HangUp(page_app(api))
        config = uvicorn.Config(
            page,
            log_config=None,
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        Server(config).run(sockets=[listening])
    say("Stopped.")

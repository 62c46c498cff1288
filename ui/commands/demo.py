"""`trimtab demo`: one prompt, three answers: as the model is, steered one way, and the other."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import click

from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.receipt_line import receipt_line
from trimtab.ui.terminal import next_steps, out, say, stages, styled

if TYPE_CHECKING:
    from trimtab.ui.client import Client
    from trimtab.ui.local_server import LocalServer

CONCEPT = "optimistic"
PROMPT = "What will our town be like in fifty years?"
SCALES = (1.0, -1.0)
MAX_TOKENS = 40


@click.command(cls=HelpfulCommand, examples=("trimtab demo",))
def demo() -> None:
    """Show steering on the default model: the same prompt unsteered, steered, and against.

    Prepares the model and builds one vector the first time; the second time it takes seconds.
    """
    began = _process_start()
    # The imports take most of the start; two threads share them while the disk is read.
    threading.Thread(target=_import_early, daemon=True).start()
    from trimtab.steering.model.default import DEFAULT_MODEL_ID, ensure_default_model

    ensure_default_model()
    say(f"Starting a server for {DEFAULT_MODEL_ID} ...")
    from trimtab.ui.client import Client
    from trimtab.ui.local_server import local_server

    with local_server(DEFAULT_MODEL_ID) as server:
        client = Client(server.url)
        say(f"Serving at {server.url}/v1 after {time.time() - began:.1f} s.")
        out(f"{styled('Prompt:', 'bold')} {PROMPT}")
        first_s = _answer(client, server.model, "unsteered", scale=None, began=began)
        say(styled(f"First token after {first_s:.1f} s.", "dim"))
        _build_if_missing(server)
        for scale in SCALES:
            _answer(client, server.model, f"{scale:+g} {CONCEPT}", scale=scale, began=began)
    say(f"The whole demo took {time.time() - began:.1f} s.")
    next_steps(
        f"trimtab vectors show {CONCEPT}",
        f'trimtab chat --steer "1.0 {CONCEPT}"',
        "trimtab serve",
    )


def _answer(client: Client, model: str, label: str, *, scale: float | None, began: float) -> float:
    """Stream one answer; return the seconds from the start of the process to its first text."""
    steering = None if scale is None else {"vectors": [{"id": CONCEPT, "scale": scale}]}
    out(f"\n{styled(label, 'bold')}")
    first_s = 0.0
    receipt = None
    for piece in client.chat(
        [{"role": "user", "content": PROMPT}],
        model=model,
        steering=steering,
        max_tokens=MAX_TOKENS,
    ):
        first_s = first_s or (time.time() - began if piece.text else 0.0)
        receipt = piece.receipt or receipt
        out(piece.text, end="")
    out()
    if receipt:
        out(styled(f"[{receipt_line(receipt)}]", "dim"))
    return first_s


def _build_if_missing(server: LocalServer) -> None:
    """Build and store the demo's vector, on the server's own copy of the model, while it idles."""
    from trimtab.steering.errors import NotFoundError

    try:
        server.store.vector(CONCEPT)
        return
    except NotFoundError:
        pass
    from trimtab.training.calibration import Budget
    from trimtab.training.steered_model import SteeredModel
    from trimtab.training.vectors.build import build_vector
    from trimtab.training.vectors.pairs import concept

    pairs = concept(CONCEPT)
    loaded, profile = server.engine.loaded, server.engine.profile
    assert loaded is not None  # the server is ready
    assert profile is not None
    say(f"Building the vector {CONCEPT!r} from {len(pairs.pairs)} bundled pairs (once).")
    began = time.perf_counter()
    with stages() as stage:
        vector = build_vector(
            SteeredModel(loaded, profile),
            pairs,
            id=CONCEPT,
            # Half of the usual spending finds the same layers in half of the time.
            budget=Budget(n_text_tokens=256, n_generated=16, n_prompts=2),
            description="hopeful about how things will turn out",
            progress=lambda name, done, total: stage(name.capitalize(), done, total),
        )
    server.store.put_vector(vector)
    say(f"Built and stored in {time.perf_counter() - began:.1f} s: {stage.spent()}.")


def _process_start() -> float:
    """Return when this process began, in seconds since the epoch."""
    import psutil

    return float(psutil.Process().create_time())


def _import_early() -> None:
    import trimtab.serving.app
    import trimtab.steering.model.loading  # noqa: F401

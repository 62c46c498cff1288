"""The real server inside this process, on a free loopback port, for commands that need one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.steering.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.serving.engines.transformers.engine import TransformersEngine
    from trimtab.steering.store import Store


class PortError(TrimtabError):
    """An address that cannot be listened on."""

    status = 500
    code = "port_unavailable"


@dataclass(frozen=True)
class LocalServer:
    """A server that is ready.

    Attributes:
        url: such as `http://127.0.0.1:40123`.
        model: the name of its model on the wire.
        engine: its engine; the model and its profile are there for building vectors.
        store: its vectors.
    """

    url: str
    model: str
    engine: TransformersEngine
    store: Store


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a bound socket, so that a taken port is known before a model is loaded.

    Raises:
        PortError: the address is taken, forbidden or not this machine's.
    """
    mend = f"Try another: --port {port + 1 if 0 < port < 65535 else 8000}."
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, OverflowError) as error:
        raise PortError(
            f"The address {host}:{port} cannot be used: {error}. Give --host 127.0.0.1 and a port "
            "from 0 to 65535."
        ) from None
    listening = socket.socket(family, kind, proto)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        reason = "is taken by another program" if error.errno == 98 else f"cannot be used: {error}"
        raise PortError(f"Port {port} on {host} {reason}. {mend}") from None
    return listening


@contextmanager
def local_server(
    model: str, *, device: str = "auto", dtype: str = "auto", any_dose: bool = False
) -> Iterator[LocalServer]:
    """Serve a model for the time of a block, on 127.0.0.1 only.

    Args:
        model, device, dtype: as `load_model` takes them.
        any_dose: lift the limit on the relative dose.

    Raises:
        ModelLoadError: the model cannot be loaded.
    """
    import uvicorn

    from trimtab.serving.app import create_app
    from trimtab.serving.engines.transformers.engine import EngineConfig, TransformersEngine
    from trimtab.serving.settings import ServerSettings
    from trimtab.steering.model.loading import load_model
    from trimtab.ui.server_log import quiet_start
    from trimtab.ui.stores import model_id, store_of

    quiet_start()
    store = store_of(model)
    engine = TransformersEngine(
        lambda: load_model(model, device=device, dtype=dtype),
        # One person, not a crowd: few rows leave each a long context.
        config=EngineConfig(max_concurrent=8, max_queue=64),
    )
    settings = ServerSettings(max_dose=None) if any_dose else ServerSettings()
    is_settled = threading.Event()
    failures: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failures.append(error)
        is_settled.set()

    app = create_app(engine, store, settings=settings, on_ready=is_settled.set, on_failed=failed)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on")
    server = uvicorn.Server(config)
    listening = listening_socket("127.0.0.1", 0)
    thread = threading.Thread(
        target=_served, args=(server, listening, failed), name="trimtab-server", daemon=True
    )
    thread.start()
    try:
        is_settled.wait()
        if failures:
            raise failures[0]
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield LocalServer(url, model_id(model), engine, store)
    finally:
        server.should_exit = True
        # Nobody waits for an answer any more; a minute is for a step of a large model.
        thread.join(timeout=60)
        listening.close()


def _served(server: Any, listening: socket.socket, failed: Any) -> None:
    try:
        server.run(sockets=[listening])
    except BaseException as error:
        failed(error)

"""What the server says on stderr while it runs: one line an event, tracebacks of its own faults."""

from __future__ import annotations

import logging
import os
import warnings


class _NotSaidTwice(logging.Filter):
    """Drops the failed start: the command line says it as its own last paragraph."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return False for what the command line says itself."""
        return record.module != "lifecycle"


def quiet_start() -> None:
    """Keep libraries' chatter off the terminal; our own warnings and errors stay."""
    if os.environ.get("TRIMTAB_DEBUG"):
        return
    warnings.simplefilter("ignore")
    for name in ("transformers", "huggingface_hub", "torch", "urllib3", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    log = logging.getLogger("trimtab.serving")
    if not any(isinstance(known, _NotSaidTwice) for known in log.filters):
        log.addFilter(_NotSaidTwice())


def log_to_stderr() -> None:
    """Send the server's own messages to stderr, with the time."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    for name in ("trimtab", "uvicorn.error"):
        log = logging.getLogger(name)
        log.addHandler(handler)
        log.setLevel(logging.WARNING)
        log.propagate = False

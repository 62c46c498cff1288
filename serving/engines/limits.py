"""What every engine refuses before it begins."""

from __future__ import annotations

from trimtab.serving.engines.base import ContextLengthError, OverloadedError, Request


def check_context(request: Request, *, most: int) -> None:
    """Refuse a request that does not fit into the context of `most` tokens.

    Raises:
        ContextLengthError: prompt plus max_tokens are longer.
    """
    n = len(request.prompt_ids)
    if n + max(request.sampling.max_tokens, 1) > most:
        raise ContextLengthError(
            f"The prompt has {n} tokens and max_tokens is {request.sampling.max_tokens}; "
            f"together they may be {most} at most.",
            param="max_tokens" if n < most else "messages",
        )


def check_queue(n_new: int, *, load: int, max_running: int, max_queue: int) -> None:
    """Refuse sequences that find no place in the queue.

    Args:
        n_new: sequences that would join.
        load: sequences that run or wait.
        max_running: sequences that may run at once.
        max_queue: sequences that may wait.

    Raises:
        OverloadedError: there is not room for all of them.
    """
    room = max_running + max_queue
    if load + n_new > room:
        raise OverloadedError(
            f"{load} sequences run or wait and at most {room} may; try again shortly.",
            retry_after_s=max(1, load // max(1, max_running)),
        )

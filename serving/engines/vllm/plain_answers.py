"""Steered answers of vLLM's own server: watched while they run, with a receipt at their end.

Ids that clients choose may clash, so nothing is kept by id: what a request asked for is handed in
by a ticket, and what is known of its answer hangs on vLLM's own record of it, and goes with it.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from trimtab.serving.engines.base import Delta, FinishReason
from trimtab.serving.engines.vllm.reports import INBOX, Inbox
from trimtab.serving.engines.vllm.served_model import ServedModel
from trimtab.serving.receipt import Receipt
from trimtab.steering.errors import SpecError
from trimtab.steering.plan import Plan
from trimtab.steering.steered_request import Counts
from trimtab.steering.step import SplitPromptError
from trimtab.steering.thinking import ThinkingSpans

TICKET = "trimtab_ticket"
"""Where a request's `extra_args` holds its ticket."""

RECEIPT = "steering"
"""Key of the receipt in an answer's `kv_transfer_params`."""

ANSWER = "trimtab_answer"
"""Attribute of vLLM's own record of a request."""


@dataclass(frozen=True)
class Asked:
    """What a request asked for; its choices share it.

    Attributes:
        plan: compiled steering.
        served: the model it was compiled for.
        path: JSON path of the steering in the request.
        receipt: of all its choices.
    """

    plan: Plan
    served: ServedModel
    path: str
    receipt: Receipt = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "receipt", Receipt(self.plan))

    def check(self, request: Any) -> None:
        """Refuse what could not be honoured for this prompt.

        Raises:
            SpecError: a limit of this vLLM, or a prompt whose tokens are unknown.
        """
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            raise SpecError(
                f"{self.path}: a prompt given as embeddings cannot be steered, because its tokens "
                "cannot be counted.",
                param=self.path,
            )
        n_prompt = len(request.prompt_token_ids)
        self.served.support.check_plan(self.plan, n_prompt=n_prompt, path=self.path)


_tickets: dict[str, Asked] = {}


@contextlib.contextmanager
def ticket_for(asked: Asked) -> Iterator[str]:
    """Return what a request must carry to be followed, for as long as it is being added."""
    ticket = uuid.uuid4().hex
    _tickets[ticket] = asked
    try:
        yield ticket
    finally:
        del _tickets[ticket]


def follow(original: Any, processor: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """Stand in for `OutputProcessor.add_request`, which every choice passes before the engine."""
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    asked = _tickets.get(extra.get(TICKET, ""))
    if asked is None:
        original(processor, request, *args, **kwargs)
        return
    asked.check(request)
    original(processor, request, *args, **kwargs)
    state = processor.request_states[request.request_id]
    answer = PlainAnswer(state, asked)
    setattr(state, INBOX, answer.inbox)
    setattr(state, ANSWER, answer)
    state.make_request_output = answer.make_output


class PlainAnswer:
    """One choice's answer while it runs.

    Args:
        state: vLLM's record of it.
        asked: what the request asked for.
    """

    def __init__(self, state: Any, asked: Asked) -> None:
        self.inbox = Inbox()
        self._state = state
        self._asked = asked
        self._make_output = state.make_request_output

    def fault(self, output: Any) -> str | None:
        """Return why an output must not reach the client; None if it may."""
        if self.inbox.failure is not None:
            return self.inbox.failure
        if output.new_token_ids and self._asked.plan.parts and not self.inbox.is_applied:
            return "the engine gave no account of the steering it was asked for"
        return None

    def make_output(
        self,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        kv_transfer_params: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Stand in for `RequestState.make_request_output`: the last output has the receipt."""
        counts = None if finish_reason is None else self._counts()
        if counts is not None:
            delta = Delta(
                finish_reason=FinishReason.STOP, steering=counts.receipt(self._asked.plan)
            )
            self._asked.receipt.note(self._state.request_index, delta)
            kv_transfer_params = {
                **(kv_transfer_params or {}),
                RECEIPT: self._asked.receipt.body(),
            }
        return self._make_output(
            new_token_ids, pooling_output, finish_reason, stop_reason, kv_transfer_params, *args,
            **kwargs,
        )  # fmt: skip

    def _counts(self) -> Counts | None:
        if self.inbox.failure is not None:
            return None
        prompt_ids = self._state.prompt_token_ids
        ids = self._state.detokenizer.output_token_ids
        # The last token was chosen but not run.
        n_tokens = len(prompt_ids) + max(len(ids) - 1, 0)
        flags = None
        if self._asked.served.marks is not None:
            spans = ThinkingSpans(self._asked.served.marks, prompt_ids)
            for token in ids:
                spans.push(token)
            flags = spans.flags(0, n_tokens)
        return self.inbox.account(
            self._asked.plan, n_prompt=len(prompt_ids), n_tokens=n_tokens, thinking=flags
        )


def process(original: Any, processor: Any, outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
    """Stand in for `OutputProcessor.process_outputs`: a steering that failed ends its request.

    The route gets an exception instead of an output, so none can take a part for the whole.
    """
    ended = [name for one in outputs for name in _ended(processor, one)]
    result = original(processor, outputs, *args, **kwargs)
    result.reqs_to_abort.extend(ended)
    return result


def _ended(processor: Any, output: Any) -> list[str]:
    state = processor.request_states.get(output.request_id)
    answer = getattr(state, ANSWER, None)
    why = None if answer is None else answer.fault(output)
    if why is None:
        return []
    parent = state.parent_req
    root = output.request_id if parent is None else parent.request_id
    ended: list[str] = processor.abort_requests([root], internal=True)
    state.queue.put(_failure(why))  # in place of the output that said it was aborted
    return ended


def _failure(why: str) -> Exception:
    if SplitPromptError.__name__ in why:
        return server_error(
            "The prompt was split over several passes, and a gate of its steering needs it whole; "
            "try again when the server is less busy.",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )
    return server_error(f"The steering of this request failed: {why}.")


def server_error(message: str, status: HTTPStatus = HTTPStatus.INTERNAL_SERVER_ERROR) -> Exception:
    """Return what vLLM's routes answer with a status of 500 or more.

    Before it had an error with a status of its own, vLLM answers 500 and puts the message in its
    log.
    """
    from vllm import exceptions

    kind = getattr(exceptions, "GracefulHTTPError", None)
    return RuntimeError(message) if kind is None else kind(message, status)

"""What a press in Chat asks: settings that the server accepts, and their place in the chat."""

from __future__ import annotations

from typing import Any

from trimtab.ui.page.api import Api
from trimtab.ui.page.chat_view import PLAIN, SURPRISE
from trimtab.ui.page.conversation import SIDES, Turn
from trimtab.ui.page.run_settings import RunSettings, read_settings
from trimtab.ui.page.visitor import Visitor


async def begin(
    visitor: Visitor,
    model: str,
    prompt: str,
    colour: str,
    choices: tuple[Any, ...],
    *,
    is_anew: bool,
) -> tuple[Turn, tuple[str, ...]]:
    """Put a new turn into the chat, in place of the last one if that is asked anew.

    Returns:
        It, and the sides that must answer: none where there is nothing to ask anew, only the
        steered one where the unsteered answer stays.

    Raises:
        TrimtabError: the settings cannot be used; the chat is as it was.
    """
    chat = visitor.chat
    again = chat.last if is_anew else None
    asked = prompt if again is None else again.settings.prompt
    settings = _read_by(settings_of(asked, *choices), colour)
    receipt = await _check(visitor.api, settings, model)
    turn = Turn(settings, dose=receipt.get("dose", {}))
    if again is not None:
        chat.stop()
        chat.turns[-1] = turn
        if _can_stay(again, settings):
            turn.baseline = again.baseline
            return turn, ("steered",)
        return turn, SIDES
    if is_anew:
        return turn, ()
    chat.stop()
    chat.drop_unanswered()
    chat.turns.append(turn)
    return turn, SIDES


def _can_stay(last: Turn, settings: RunSettings) -> bool:
    """Return whether a turn's unsteered answer is also the answer under other settings."""
    return (
        last.baseline.finish in ("stop", "length")
        and last.settings.sampling() == settings.sampling()
        and last.settings.probes == settings.probes
    )


def settings_of(
    prompt: str, panel: Any, max_tokens: Any, temperature: Any, seed: Any
) -> RunSettings:
    """Return the settings from the components' values.

    Raises:
        LinkError: a value is out of its range.
    """
    return read_settings(
        {
            **(panel or {}),
            "prompt": prompt,
            "max_tokens": int(max_tokens if max_tokens is not None else 128),
            "temperature": float(temperature or 0.0),
            "seed": None if seed is None else int(seed),
        }
    )


def _read_by(settings: RunSettings, colour: str) -> RunSettings:
    """Return the settings with the probe read that the tokens are coloured by."""
    if colour in (PLAIN, SURPRISE, *settings.probes):
        return settings
    return read_settings(settings.model_dump() | {"probes": [*settings.probes[:7], colour]})


async def _check(api: Api, settings: RunSettings, model: str) -> dict[str, Any]:
    """Return the server's report on the steering, before anything is generated.

    Raises:
        ServerError: it refuses the steering, in its own words.
    """
    if not settings.is_steered:
        return {}
    fields: dict[str, Any] = {"model": settings.model_name(model)}
    if settings.steering is not None:
        fields["steering"] = settings.steering
    found: dict[str, Any] = await api.post("/v1/steering/check", fields)
    return found

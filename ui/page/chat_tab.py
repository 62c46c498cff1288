"""The Chat tab: one prompt, the unsteered answer beside the steered one, and what steers it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from trimtab.steering.errors import TrimtabError
from trimtab.ui.page.catalogue import catalogue
from trimtab.ui.page.chat_ask import begin, settings_of
from trimtab.ui.page.chat_run import body, run
from trimtab.ui.page.chat_view import PLAIN, SURPRISE, last_html, legend_html, past_html
from trimtab.ui.page.conversation import SIDES
from trimtab.ui.page.gauges import gauges_html
from trimtab.ui.page.live import LIVE
from trimtab.ui.page.notice import done, note, problem
from trimtab.ui.page.run_settings import RunSettings, from_link, read_settings, to_link
from trimtab.ui.page.share import share_html
from trimtab.ui.page.snippets import as_curl, as_json, as_python, request_body
from trimtab.ui.page.visitor import Visitor, Visitors

_PANEL_SCRIPT = (Path(__file__).parent / "steering_panel.js").read_text(encoding="utf-8")
_PROMPT = "What will our town be like in fifty years?"
_MAX_TURNS = 40


class ChatTab:
    """The tab's components and what happens when they are used.

    Other tabs may show a vector or classifier here: `offered` takes what `offering` and `refresh`
    return.

    Args:
        visitors: who is on the page.
    """

    def __init__(self, visitors: Visitors) -> None:
        self.visitors = visitors
        with gr.Row(elem_id="chat"):
            with gr.Column(scale=1, min_width=280, elem_id="chat-choices"):
                self.panel = gr.HTML(
                    {},
                    html_template='<div class="tt-panel"></div>',
                    js_on_load=_PANEL_SCRIPT,
                    catalogue=None,
                    elem_id="steering-panel",
                )
                with gr.Accordion("Sampling", open=False, elem_id="sampling"):
                    self.max_tokens = gr.Number(
                        128, label="Longest answer, tokens", precision=0, elem_id="max-tokens"
                    )
                    self.temperature = gr.Number(0.0, label="Temperature", step=0.1)
                    self.seed = gr.Number(None, label="Seed (empty: drawn)", precision=0)
            with gr.Column(scale=3, min_width=320):
                self.notice = gr.HTML("", elem_id="chat-notice")
                self.past = gr.HTML("", elem_id="past")
                self.stage = gr.HTML("", elem_id="stage")
                self.legend = gr.HTML("", elem_id="legend")
                self.gauges = gr.HTML("", elem_id="gauges")
                with gr.Row(equal_height=True):
                    self.prompt = gr.Textbox(
                        _PROMPT,
                        label="Your prompt",
                        lines=2,
                        max_lines=8,
                        scale=4,
                        elem_id="prompt",
                        max_length=8000,
                    )
                    with gr.Column(scale=1, min_width=120):
                        self.send = gr.Button("Send", variant="primary", elem_id="send")
                        with gr.Row():
                            self.stop = gr.Button("Stop", size="sm", elem_id="stop", min_width=60)
                            self.fresh = gr.Button(
                                "New chat", size="sm", elem_id="new-chat", min_width=60
                            )
                self.colour = gr.Dropdown(
                    [PLAIN, SURPRISE],
                    value=PLAIN,
                    label="Colour the tokens by",
                    elem_id="colour",
                    allow_custom_value=True,
                )
                with gr.Accordion(
                    "These settings: share, save, copy", open=False, elem_id="settings"
                ):
                    self.share = gr.HTML("", elem_id="share")
                    with gr.Row(equal_height=True):
                        self.preset_name = gr.Textbox(
                            label="Save as preset", placeholder="a name", elem_id="preset-name"
                        )
                        self.save = gr.Button("Save", elem_id="save-preset", min_width=80)
                    self.snippets = [
                        gr.Textbox(
                            "",
                            label=name,
                            lines=4,
                            max_lines=16,
                            interactive=False,
                            buttons=["copy"],
                            elem_id=f"as-{name.lower()}",
                        )
                        for name in ("JSON", "curl", "Python")
                    ]
        self._wire()

    @property
    def offered(self) -> list[Any]:
        """What shows what is stored: the panel, and the list to colour the tokens by."""
        return [self.panel, self.colour]

    @property
    def _choices(self) -> list[Any]:
        return [self.panel, self.max_tokens, self.temperature, self.seed]

    def _wire(self) -> None:
        shown = [self.stage, self.gauges, self.notice, self.past, self.share, *self.snippets]
        # Nothing waits for a run before it: a new one stops the old.
        live: dict[str, Any] = {**LIVE, "trigger_mode": "multiple"}
        gr.on(
            [self.send.click, self.prompt.submit],
            self._sent,
            [self.prompt, self.colour, *self._choices],
            shown,
            **live,
        )
        gr.on(
            [self.panel.submit, self.max_tokens.blur, self.temperature.blur, self.seed.blur],
            self._steered_anew,
            [self.prompt, self.colour, *self._choices],
            shown,
            **live,
        )
        self.stop.click(self._stopped, None, None, **live)
        self.fresh.click(
            self._begun_anew, None, [self.past, self.stage, self.gauges, self.notice], **live
        )
        self.colour.change(
            self._coloured, self.colour, [self.past, self.stage, self.legend], **live
        )
        self.save.click(
            self._saved, [self.preset_name, *self._choices], [self.notice, *self.offered], **live
        )

    @property
    def opened(self) -> list[Any]:
        """What `open` sets."""
        return [
            *self.offered,
            self.prompt,
            self.max_tokens,
            self.temperature,
            self.seed,
            self.past,
            self.stage,
            self.notice,
        ]

    async def open(self, request: gr.Request) -> list[Any]:
        """Return the values of `opened` for somebody who comes, from the link they followed."""
        visitor = self.visitors.of(request)
        notice, settings = "", RunSettings(prompt=_PROMPT)
        try:
            link = request.query_params.get("run")
            if link:
                settings = from_link(link)
        except TrimtabError as error:
            notice = problem(error)
        try:
            offered = await catalogue(visitor.api)
        except TrimtabError as error:
            notice, offered = problem(error), None
        is_empty = not settings.is_steered and not settings.probes
        if offered is not None and is_empty and offered["vectors"]:
            first = offered["vectors"][0]["id"]
            settings = settings.model_copy(
                update={
                    "vectors": read_settings({"vectors": [{"id": first, "scale": 1.0}]}).vectors
                }
            )
        return [
            *offering(offered, settings=panel_value(settings)),
            settings.prompt,
            settings.max_tokens,
            settings.temperature,
            settings.seed,
            past_html(visitor.chat),
            last_html(visitor.chat),
            notice,
        ]

    async def refresh(self, request: gr.Request) -> list[Any]:
        """Return the values of `offered` with what is stored now."""
        return offering(await catalogue(self.visitors.of(request).api))

    async def _sent(
        self, request: gr.Request, prompt: str, colour: str, *choices: Any
    ) -> AsyncIterator[list[Any]]:
        visitor = self.visitors.of(request)
        if not prompt.strip():
            yield self._only_notice(note("Type a prompt first."))
            return
        visitor.chat.stop()
        if len(visitor.chat.turns) >= _MAX_TURNS:
            yield self._only_notice(note("This chat is long; start a new one."))
            return
        async for shown in self._run(visitor, prompt, colour, choices):
            yield shown

    async def _steered_anew(
        self, request: gr.Request, prompt: str, colour: str, *choices: Any
    ) -> AsyncIterator[list[Any]]:
        """Answer the last prompt again under what is chosen now; the unsteered side stays.

        Says and does nothing if it is overtaken by another press that asks for answers.
        """
        visitor = self.visitors.of(request)
        async for shown in self._run(visitor, prompt, colour, choices, is_anew=True):
            yield shown

    async def _run(
        self,
        visitor: Visitor,
        prompt: str,
        colour: str,
        choices: tuple[Any, ...],
        *,
        is_anew: bool = False,
    ) -> AsyncIterator[list[Any]]:
        chat = visitor.chat
        chat.n_presses += 1
        press = chat.n_presses

        def is_overtaken() -> bool:
            return is_anew and press < chat.n_presses

        try:
            async with chat.asking:
                if is_overtaken():
                    return
                model = await visitor.model()
                turn, sides = await begin(visitor, model, prompt, colour, choices, is_anew=is_anew)
        except TrimtabError as error:
            if not is_overtaken():
                yield self._only_notice(problem(error))
            return
        asked = request_body(body(turn, "steered", model, chat.messages("steered", until=turn)))
        fixed = [
            past_html(chat, colour=colour),
            share_html(to_link(turn.settings)),
            as_json(asked),
            as_curl(asked, url=visitor.api.url, has_key=visitor.api.key is not None),
            as_python(asked, url=visitor.api.url, has_key=visitor.api.key is not None),
        ]
        if not sides:
            yield [last_html(chat, colour=colour), gauges_html(turn), "", *fixed]
            return
        async for _ in run(visitor.api, chat, turn, model=model, sides=sides):
            yield [last_html(chat, colour=colour), gauges_html(turn), "", *fixed]
            fixed = [gr.skip()] * len(fixed)

    def _only_notice(self, html: str) -> list[Any]:
        return [gr.skip(), gr.skip(), html, *[gr.skip()] * (2 + len(self.snippets))]

    async def _stopped(self, request: gr.Request) -> None:
        chat = self.visitors.of(request).chat
        async with chat.asking:
            chat.stop()

    async def _begun_anew(self, request: gr.Request) -> list[Any]:
        chat = self.visitors.of(request).chat
        async with chat.asking:
            chat.stop()
            chat.turns.clear()
        return [past_html(chat), last_html(chat), gauges_html(None), ""]

    async def _coloured(self, request: gr.Request, colour: str) -> list[Any]:
        visitor = self.visitors.of(request)
        labels: dict[str, list[str]] = {}
        for turn in visitor.chat.turns:
            for side in SIDES:
                for piece in turn.side(side).pieces[:1]:
                    labels |= {name: list(read) for name, read in piece.readings.items()}
        names = {name: found for name, found in labels.items() if len(found) > 1}
        legend = legend_html(colour, names)
        if colour not in (PLAIN, SURPRISE) and colour not in labels:
            legend = note(f"{colour} is read from the next answer on.")
        chat = visitor.chat
        return [past_html(chat, colour=colour), last_html(chat, colour=colour), legend]

    async def _saved(self, request: gr.Request, name: str, *choices: Any) -> list[Any]:
        visitor = self.visitors.of(request)
        try:
            settings = settings_of("", *choices)
            if settings.steering is None:
                return [note("Choose something to steer with first."), gr.skip(), gr.skip()]
            await visitor.api.put(f"/v1/steering/presets/{_path(name)}", settings.steering)
            served = await visitor.model()
            said = f"Saved. Ask for it as the model {served}:{name.strip()}."
            return [done(said), *await self.refresh(request)]
        except TrimtabError as error:
            return [problem(error), gr.skip(), gr.skip()]


def offering(
    stored: dict[str, Any] | None,
    *,
    settings: dict[str, Any] | None = None,
    colour: str | None = None,
) -> list[Any]:
    """Return the values of a chat's `offered`.

    Args:
        stored: the panel's catalogue; None where the server cannot be asked.
        settings: what the panel is to hold; None leaves it as it is.
        colour: what the tokens are to be coloured by; None leaves it as it is.
    """
    panel: dict[str, Any] = {} if settings is None else {"value": settings}
    chosen: dict[str, Any] = {} if colour is None else {"value": colour}
    readers = [] if stored is None else stored["readers"]
    return [
        gr.HTML(catalogue=stored, **panel),
        gr.Dropdown(choices=[PLAIN, SURPRISE, *readers], **chosen),
    ]


def panel_value(settings: RunSettings) -> dict[str, Any]:
    """Return the part of the settings that the panel holds."""
    return settings.model_dump(
        include={"preset", "vectors", "ablate", "guidance", "when", "probes"}, exclude_none=True
    )


def _path(name: str) -> str:
    return quote(name.strip(), safe="")

"""A prompt's pieces are the prompt, and each token knows who wrote it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_chat import TEMPLATE, byte_tokenizer

from trimtab.attribution.errors import AttributionError
from trimtab.attribution.prompt import Prompt, TokenKind, prompt_from_messages, prompt_from_text
from trimtab.steering.model.loading import LoadedModel

STRIPPING = TEMPLATE.replace("m['content']", "m['content'] | trim")
# Words of its own around the user's, and no mark between a message and what follows it.
WORDY = (
    "You are kind.\n{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXTS = {
    "accents": "naïve café, déjà vu",
    "combining": "e\u0301 and a\u0308\u0304",
    "emoji": "a 👩‍👩‍👧 family 🏳️‍🌈",
    "right to left": "שלום עולם مرحبا",
    "lines": "one\r\ntwo\n\n\nthree\rfour",
    "spaces": "  two before, two after  ",
    "only spaces": " \n ",
    "template": "You are kind.\nuser: <|start|>user\nhi<|end|>\n",
    "private use": "\ue0000\ue001 \ue0001\ue001",
    "repeated": "the the the",
    "nothing": "",
}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def rendered(tokenizer: Any, messages: list[dict[str, str]], *, tokenize: bool = False) -> Any:
    goes_on = messages[-1]["role"] == "assistant"
    made = tokenizer.apply_chat_template(
        messages,
        tokenize=tokenize,
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
    )
    return made["input_ids"] if tokenize else made


def assert_tiles(prompt: Prompt) -> None:
    at = 0
    for token in prompt.tokens:
        assert token.start == at
        assert token.text == prompt.text[at : token.stop]
        at = token.stop
    assert at == len(prompt.text)


def words_of(prompt: Prompt, message: int | None) -> str:
    return "".join(t.text for t in prompt.tokens if t.message == message)


@pytest.fixture
def toy() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def real(smollm2: LoadedModel) -> Any:
    return smollm2.tokenizer


@pytest.mark.parametrize("template", [TEMPLATE, STRIPPING, WORDY])
@pytest.mark.parametrize("name", TEXTS)
def test_every_message_is_found_in_what_the_model_reads(toy: Any, template: str, name: str) -> None:
    """A message found at the wrong place gives its scores to the template's words or a mate's."""
    toy.chat_template = template
    text = TEXTS[name]
    messages = [user(text), assistant("the"), user(text), assistant(text), user("the end")]
    prompt = prompt_from_messages(toy, messages)
    assert prompt.text == rendered(toy, messages)
    assert prompt.ids == rendered(toy, messages, tokenize=True)
    assert_tiles(prompt)
    for i, message in enumerate(messages):
        wanted = message["content"].strip() if template == STRIPPING else message["content"]
        # Marks that the user typed are special tokens all the same.
        for mark in ("<|start|>", "<|end|>"):
            wanted = wanted.replace(mark, "")
        assert words_of(prompt, i) == wanted
    for i, token in enumerate(prompt.tokens):
        assert (token.kind is TokenKind.TEXT) == (token.message is not None)
        assert (i in prompt.content) == (token.kind is TokenKind.TEXT)
        if token.message is not None:
            assert token.role == messages[token.message]["role"]


def test_repeated_words_stay_apart(toy: Any) -> None:
    """Scores kept by a token's text add up the three."""
    prompt = prompt_from_messages(toy, [user("the the the")])
    found = [t for t in prompt.tokens if t.text == "t" and t.kind is TokenKind.TEXT]
    assert [t.start - found[0].start for t in found] == [0, 4, 8]


def test_the_templates_own_words_are_not_content(toy: Any) -> None:
    """Words that the template adds would be shown to the user as theirs."""
    toy.chat_template = WORDY
    prompt = prompt_from_messages(toy, [user("You are kind.")])
    kinds = [(t.kind.value, t.text) for t in prompt.tokens if t.text == "Y"]
    assert kinds == [("template", "Y"), ("text", "Y")]
    assert words_of(prompt, None) == "You are kind.\nuser: \nassistant:"


def test_a_last_answer_is_left_open(toy: Any) -> None:
    """An end mark after it would make the model begin a new turn instead of going on."""
    messages = [user("hi"), assistant("I think ")]
    prompt = prompt_from_messages(toy, messages)
    assert prompt.text.endswith("assistant\nI think ")
    assert prompt.ids == rendered(toy, messages, tokenize=True)
    assert words_of(prompt, 1) == "I think "


def test_marks_the_user_typed_are_special(toy: Any) -> None:
    """Taking away an end mark is no question about words."""
    prompt = prompt_from_messages(toy, [user("a<|end|>b")])
    assert [(t.text, t.kind) for t in prompt.tokens if t.id == toy.eos_token_id] == [
        ("<|end|>", TokenKind.SPECIAL)
    ] * 2
    assert words_of(prompt, 0) == "ab"


def test_a_character_of_several_tokens_is_shown_once(toy: Any) -> None:
    """Each of four bytes shown as the whole emoji makes four emojis of one."""
    prompt = prompt_from_text(toy, "x👧é")
    assert [t.text for t in prompt.tokens] == ["x", "", "", "", "👧", "", "é"]
    assert all(t.kind is TokenKind.TEXT for t in prompt.tokens)


@pytest.mark.parametrize("name", sorted(set(TEXTS) - {"nothing", "template"}))
def test_a_plain_prompt_is_all_content(toy: Any, name: str) -> None:
    """Leading spaces or line ends lost here shift every span after them."""
    prompt = prompt_from_text(toy, TEXTS[name])
    assert prompt.ids == toy(TEXTS[name])["input_ids"]
    assert_tiles(prompt)
    assert prompt.content == list(range(len(prompt.tokens)))
    assert all(t.role is None and t.message is None for t in prompt.tokens)


def test_prompts_that_cannot_be_read(toy: Any) -> None:
    """Each of these would end in an IndexError or in scores for the wrong words."""
    with pytest.raises(AttributionError, match="empty"):
        prompt_from_text(toy, "")
    with pytest.raises(AttributionError, match="no messages"):
        prompt_from_messages(toy, [])
    toy.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(AttributionError, match="cannot be found again"):
        prompt_from_messages(toy, [user("hello")])
    toy.chat_template = "{{ raise_exception('system first') }}"
    with pytest.raises(AttributionError, match="system first"):
        prompt_from_messages(toy, [user("hello")])
    toy.chat_template = None
    with pytest.raises(AttributionError, match="no chat template"):
        prompt_from_messages(toy, [user("hello")])


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(text=st.text(), answer=st.text())
def test_any_text_tiles_with_the_real_tokenizer(real: Any, text: str, answer: str) -> None:
    """Byte-level tokens that end inside a character are where spans go wrong."""
    messages = [user(text), assistant(answer), user(text)]
    prompt = prompt_from_messages(real, messages)
    assert prompt.ids == rendered(real, messages, tokenize=True)
    assert_tiles(prompt)
    if real(text)["input_ids"]:
        plain = prompt_from_text(real, text)
        assert plain.ids == real(text)["input_ids"]
        assert_tiles(plain)
    for i, message in enumerate(messages):
        # The vocabulary lacks some control characters; what is not read belongs to no message.
        if real.decode(real(message["content"])["input_ids"]) == message["content"]:
            # A line end before the message may be in one token with its first spaces.
            own = message["content"]
            assert words_of(prompt, i) in (own, "\n" + own)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["You are a helpful AI assistant", "user\n<|im_start|>user\nhi"])
def test_words_the_real_template_uses_too(real: Any, text: str) -> None:
    """The default system prompt begins with these words."""
    prompt = prompt_from_messages(real, [user(text)])
    assert prompt.text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert words_of(prompt, 0) == text.replace("<|im_start|>", "")

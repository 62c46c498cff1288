"""Which tokens a term touches, against the definition written out token by token."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trimtab.steering.spec import Apply
from trimtab.steering.window import Window

COUNTS = st.none() | st.integers(0, 6)
WINDOWS = st.builds(
    Window,
    prompt=st.booleans(),
    generation=st.booleans(),
    thinking=st.booleans(),
    first=COUNTS,
    after=COUNTS,
)


def is_inside(window: Window, position: int, n_prompt: int, thinks: bool) -> bool:
    """The definition: a prompt token by `prompt`; a generated one by its phase and its number."""
    if position < n_prompt:
        return window.prompt
    number = position - n_prompt
    phase = window.thinking if thinks else window.generation
    is_early = window.first is None or number < window.first
    is_late = window.after is None or number >= window.after
    return phase and is_early and is_late


@given(WINDOWS, st.integers(0, 5), st.lists(st.booleans(), max_size=14))
def test_a_window_is_its_definition(window: Window, n_prompt: int, thinks: list[bool]) -> None:
    """An off-by-one at a phase's edge steers the last prompt token or skips the first answer's."""
    expected = [is_inside(window, i, n_prompt, t) for i, t in enumerate(thinks)]
    positions = np.arange(len(thinks))
    got = window.select(positions, n_prompt=n_prompt, thinking=np.array(thinks, dtype=bool))
    assert got.dtype == bool
    assert got.tolist() == expected
    plain = window.select(positions, n_prompt=n_prompt)
    assert plain.tolist() == [is_inside(window, i, n_prompt, False) for i in range(len(thinks))]


@given(WINDOWS, st.integers(0, 5), st.lists(st.booleans(), max_size=14), st.data())
def test_a_window_does_not_depend_on_the_chunks(
    window: Window, n_prompt: int, thinks: list[bool], data: st.DataObject
) -> None:
    """Counting from the chunk's start restarts `first` and `after` at every decoding step."""
    marks = np.array(thinks, dtype=bool)
    positions = np.arange(len(thinks))
    whole = window.select(positions, n_prompt=n_prompt, thinking=marks)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(thinks)), max_size=4)))
    pieces = [
        window.select(piece, n_prompt=n_prompt, thinking=mark)
        for piece, mark in zip(np.split(positions, cuts), np.split(marks, cuts), strict=True)
    ]
    assert np.concatenate(pieces).tolist() == whole.tolist()


@given(WINDOWS)
def test_everywhere_and_empty_are_what_they_say(window: Window) -> None:
    """`empty` refuses a request that asks for nothing; wrongly true it refuses a good one."""
    seen = [
        is_inside(window, position, 2, thinks) for position in range(12) for thinks in (False, True)
    ]
    assert window.empty == (not any(seen))
    assert window.everywhere <= all(seen)


def test_thinking_follows_generation_unless_it_says() -> None:
    """A model that thinks would go unsteered for most of its answer."""
    assert Window.of(Apply(generation=False)) == Window(generation=False, thinking=False)
    assert Window.of(Apply(generation=False, thinking=True)) == Window(generation=False)
    assert Window.of(Apply()).everywhere

"""The PTX that tests run on a CPU, against what the PTX ISA says of its instructions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx_emulator import run

RANDOM = np.random.default_rng(0)


def words(n: int = 64) -> np.ndarray:
    return RANDOM.integers(0, 1 << 32, n, dtype=np.uint32)


def only(text: str, *inputs: np.ndarray) -> np.ndarray:
    return run(text, list(inputs), 1)[0]


@pytest.mark.parametrize(
    ("table", "law"),
    [
        (0xEA, lambda a, b, c: (a & b) | c),
        (0x96, lambda a, b, c: a ^ b ^ c),
        (0x1F, lambda a, b, c: ~a | (~b & ~c)),
    ],
)
def test_lop3(table: int, law: object) -> None:
    """The table read with a and c exchanged is right for symmetric functions alone."""
    a, b, c = words(), words(), words()
    assert callable(law)
    assert (only(f"lop3.b32 $0, $1, $2, $3, {table:#x};", a, b, c) == law(a, b, c)).all()


def test_prmt() -> None:
    """Bytes 4 to 7 are the second register's; bit 3 of a selector spreads a byte's sign."""
    a, b = np.array([0x33221100], np.uint32), np.array([0xF7665544], np.uint32)
    assert only("prmt.b32 $0, $1, $2, 0x7410;", a, b) == 0xF7441100
    assert only("prmt.b32 $0, $1, $2, 0x00F8;", a, b) == 0x0000FF00
    assert only("prmt.b32 $0, $1, $2, 0x12345670;", a, b) == 0x5566F700


def test_integers_wrap() -> None:
    """Sums that saturate, or shifts that carry the sign in, are not PTX's."""
    a = np.array([0xFFFFFFF0], np.uint32)
    assert only("add.u32 $0, $1, 0x20;", a) == 0x10
    assert only("sub.u32 $0, 0x10, $1;", a) == 0x20
    assert only("shr.u32 $0, $1, 28;", a) == 0xF
    assert only("mad.lo.u32 $0, $1, 3, 1;", a) == (0xFFFFFFF0 * 3 + 1) & 0xFFFFFFFF


@pytest.mark.parametrize(("name", "dtype"), [("bf16x2", torch.bfloat16), ("f16x2", torch.float16)])
def test_halves(name: str, dtype: torch.dtype) -> None:
    """Halves exchanged, truncated or flushed to zero make decoded weights wrong unseen."""
    a, b = (torch.randn(2, 64).to(dtype) * 2.0**e for e in (-13, 3))
    inputs = [t.contiguous().view(torch.int16).numpy().view(np.uint32) for t in (a, b)]
    for word, wanted in (("mul", a * b), ("sub", a - b)):
        found = run(f"{word}.rn.{name} $0, $1, $2;", inputs, 1)[0]
        assert (found == wanted.view(torch.int16).numpy().view(np.uint32)).all()


def test_what_is_unknown_is_refused() -> None:
    """A guess at an instruction gives numbers that look like an answer."""
    with pytest.raises(NotImplementedError, match="shf"):
        run("shf.l.wrap.b32 $0, $1, $1, 3;", [words()], 1)
    with pytest.raises(KeyError):
        run("mov.b32 $0, t;", [words()], 1)

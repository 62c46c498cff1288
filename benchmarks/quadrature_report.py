"""The tables of `quadrature.py`: every rule on the recorded paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from trimtab.attribution.methods.quadrature import rule

FINEST = 129
GAUSS = (8, 16, 32)
GRID = np.linspace(0, 1, FINEST)
# What a rule makes of a record: contributions `[n_terms, n_tokens]` and what they miss of F's
# change, one number a term or one for all.
Rule = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def report(path: Path) -> str:
    """Return the table over all prompts, and those of the adaptive rules by half."""
    record = dict(np.load(path))
    n = len(record) // 2
    paths = [(record[f"values_{i}"], record[f"parts_{i}"]) for i in range(n)]
    coarse, fine = ([_missing(v, made(v, p)) for v, p in paths] for made in (_finest, _union))
    change = np.median([abs(_change(v)) for v, _ in paths])
    agree = [_spearman(_finest(v, p), _union(v, p)) for v, p in paths]
    lines = [
        f"{n} questions, F's change along the path {change:.2f} nats in the median. Reference A, "
        f"the trapezoid over {FINEST} points, misses {np.median(coarse):.2f} nats of it; reference "
        f"B, the trapezoid over these and the Gauss-Legendre points together "
        f"({FINEST + sum(GAUSS)}), {np.median(fine):.2f}. Their ranks agree to "
        f"{np.median(agree):.3f} (least {min(agree):.2f}). Residuals are before any correction.",
        "",
        "| rule | points | rank correlation with A: median, mean, share >= .9 | with B | A, "
        "corrected: median, mean | residual / change, median | residual, nats, median |",
        "|---|---|---|---|---|---|---|",
        *_rows(_rules(), paths),
        "",
        "Bisection by what is halved first, even-numbered questions (chosen on) and odd-numbered "
        "ones (confirmed on):",
    ]
    for half in (0, 1):
        lines += ["", "| rule | points | with A | with B | corrected | residual / change | nats |"]
        lines += ["|---|---|---|---|---|---|---|", *_rows(_adaptive(), paths[half::2])]
    return "\n".join(lines) + "\n"


# --- the rules


def _rules() -> Iterator[tuple[str, int, Rule]]:
    for n in (8, 16, 32, 64):
        places = (2 * np.arange(n) + 1) * (64 // n)
        yield "midpoint", n, _fixed(places, rule("midpoint", n)[1])
    start = FINEST
    for n in GAUSS:
        yield "gausslegendre", n, _fixed(np.arange(start, start + n), rule("gausslegendre", n)[1])
        start += n
    for n in (9, 17, 33, 65):
        places = np.arange(0, FINEST, 128 // (n - 1))
        yield "trapezoid", n, _fixed(places, rule("trapezoid", n)[1])
        weights = rule("trapezoid", n)[1] * (n - 1) / n
        yield "captum's riemann_trapezoid", n, _fixed(places, weights)
    for n in (9, 17, 25, 33, 49, 65):
        yield "bisection", n, _bisection(n, _missed)
    yield "gradient x input", 1, _fixed(np.array([FINEST - 1]), np.ones(1))


def _adaptive() -> Iterator[tuple[str, int, Rule]]:
    for n in (17, 25, 33):
        yield "bisection, F missed", n, _bisection(n, _missed)
        yield "bisection, F's change", n, _bisection(n, lambda v, p, w: np.abs(np.diff(v)))
        yield "bisection, tokens' change", n, _bisection(n, _turned)
        yield (
            "bisection, both",
            n,
            _bisection(n, lambda v, p, w: _missed(v, p, w) + _turned(v, p, w)),
        )
        places = np.unique(np.round(128 * np.linspace(0, 1, n) ** 2).astype(int))
        yield "trapezoid, squared spacing", n, _between(lambda v, p, at=places: at)


def _fixed(places: np.ndarray, weights: np.ndarray) -> Rule:
    def made(values: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        terms = parts[places] * weights[:, None]
        return terms, np.array([_change(values) - terms.sum()])

    return made


def _between(places_of: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Rule:
    """The trapezoid between any points of the grid."""

    def made(values: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = places_of(values, parts)
        terms = (parts[at[1:]] + parts[at[:-1]]) / 2 * np.diff(GRID[at])[:, None]
        return terms, np.diff(values[at]) - terms.sum(1)

    return made


def _bisection(n: int, error: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Rule:
    """As `integrated_gradients`, but no interval of the grid is halved."""

    def places(values: np.ndarray, parts: np.ndarray) -> np.ndarray:
        at = np.array([0, FINEST - 1])
        while len(at) < n:
            size = error(values[at], parts[at], np.diff(GRID[at]))
            worst = int(np.where(np.diff(at) > 1, size, -1.0).argmax())
            at = np.insert(at, worst + 1, (at[worst] + at[worst + 1]) // 2)
        return at

    return _between(places)


def _missed(values: np.ndarray, parts: np.ndarray, width: np.ndarray) -> np.ndarray:
    """What the trapezoid misses of F's change in each interval."""
    missed: np.ndarray = np.abs(np.diff(values) - (parts[1:] + parts[:-1]).sum(1) / 2 * width)
    return missed


def _turned(values: np.ndarray, parts: np.ndarray, width: np.ndarray) -> np.ndarray:
    """How far the tokens' parts change over each interval, times its width."""
    turned: np.ndarray = np.abs(np.diff(parts, axis=0)).sum(1) * width
    return turned


# --- how good they are


def _rows(
    rules: Iterator[tuple[str, int, Rule]], paths: list[tuple[np.ndarray, np.ndarray]]
) -> Iterator[str]:
    for name, points, made in rules:
        found = [made(v, p) for v, p in paths]
        scores = [terms.sum(0) for terms, _ in found]
        corrected = [s + _handed_out(*f) for s, f in zip(scores, found, strict=True)]
        a = np.array([_spearman(s, _finest(*p)) for s, p in zip(scores, paths, strict=True)])
        b = np.array([_spearman(s, _union(*p)) for s, p in zip(scores, paths, strict=True)])
        c = np.array([_spearman(s, _finest(*p)) for s, p in zip(corrected, paths, strict=True)])
        missing = np.array([_missing(p[0], s) for s, p in zip(scores, paths, strict=True)])
        change = np.array([abs(_change(v)) for v, _ in paths])
        yield (
            f"| {name} | {points} | {_summary(a)} | {_summary(b)} | {np.median(c):.2f}, "
            f"{c.mean():.2f} | {np.median(missing / change):.2f} | {np.median(missing):.2f} |"
        )


def _summary(ranks: np.ndarray) -> str:
    # A rank correlation of exactly .9 must not fall to rounding.
    return f"{np.median(ranks):.2f}, {ranks.mean():.2f}, {np.mean(ranks >= 0.9 - 1e-9):.0%}"


def _handed_out(terms: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    size = np.abs(terms) if len(residuals) == len(terms) else np.abs(terms).sum(0, keepdims=True)
    out: np.ndarray = (size / size.sum(1, keepdims=True) * residuals[:, None]).sum(0)
    return out


def _change(values: np.ndarray) -> float:
    return float(values[FINEST - 1] - values[0])


def _missing(values: np.ndarray, scores: np.ndarray) -> float:
    return abs(_change(values) - float(scores.sum()))


def _finest(values: np.ndarray, parts: np.ndarray) -> np.ndarray:
    return _trapezoid(GRID, parts[:FINEST])


def _union(values: np.ndarray, parts: np.ndarray) -> np.ndarray:
    nodes = np.concatenate([GRID, *(rule("gausslegendre", n)[0] for n in GAUSS)])
    order = nodes.argsort()
    return _trapezoid(nodes[order], parts[order])


def _trapezoid(nodes: np.ndarray, parts: np.ndarray) -> np.ndarray:
    total: np.ndarray = ((parts[1:] + parts[:-1]) / 2 * np.diff(nodes)[:, None]).sum(0)
    return total


def _spearman(ours: np.ndarray, theirs: np.ndarray) -> float:
    ranks = [x.argsort().argsort() for x in (ours, theirs)]
    return float(np.corrcoef(*ranks)[0, 1])

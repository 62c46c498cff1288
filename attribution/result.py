"""The outcome of an attribution: a score for each token of the prompt, and how far to trust it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.attribution.faithfulness import Faithfulness
from trimtab.attribution.objective import Objective
from trimtab.attribution.prompt import Prompt


@dataclass(frozen=True)
class OutputToken:
    """A token of an answer: which answer, its id, its text decoded alone, log P in nats."""

    answer: str
    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Attribution:
    """Scores of a prompt's tokens.

    Attributes:
        prompt: the prompt.
        objective: what was explained.
        scores: one a prompt token, in `units`; None for template and special tokens.
        units: `nats` of F, or `share`.
        output: the answers' tokens.
        method: the method's name.
        settings: its options, and what the run came to.
        baseline: what stood in for a token taken away.
        value: F at the prompt.
        base_value: F with every content token taken away.
        residual: what the scores' sum missed of `value - base_value` before any correction; None
            for a method that promises no sum.
        error_bound: an estimate of the error of that sum; None likewise.
        model: id of the model.
        dtype: the precision it ran in.
        steered: fingerprint of the steering it ran under; None if it ran as it is.
        forward_rows: variants of the prompt read.
        backward_rows: gradients taken.
        seconds: wall-clock time.
        faithfulness: how the scores fare, beside permuted ones; None if nobody asked.
    """

    prompt: Prompt
    objective: Objective
    scores: tuple[float | None, ...]
    units: str
    output: tuple[OutputToken, ...]
    method: str
    settings: dict[str, Any]
    baseline: str
    value: float
    base_value: float
    residual: float | None
    error_bound: float | None
    model: str
    dtype: str
    steered: str | None
    forward_rows: int
    backward_rows: int
    seconds: float
    faithfulness: Faithfulness | None = None

    @property
    def total(self) -> float:
        """Sum of the scores."""
        return sum(score for score in self.scores if score is not None)

    @property
    def completeness_gap(self) -> float | None:
        """F(x) - F(baseline) minus the scores' sum as returned; None where no sum is promised."""
        if self.residual is None:
            return None
        return self.value - self.base_value - self.total

    @property
    def max_abs(self) -> float:
        """The largest score's size: the colour scale's end."""
        return max((abs(score) for score in self.scores if score is not None), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON takes it; numbers are rounded to 6 decimals."""
        return {
            "model": self.model,
            "method": self.method,
            "params": {**self.settings, "baseline": self.baseline},
            "dtype": self.dtype,
            "objective": {
                "kind": self.objective.kind,
                "length_normalized": self.objective.is_normalized,
                "value": round(self.value, 6),
                "baseline_value": round(self.base_value, 6),
                "units": "nats",
            },
            "text": self.prompt.text,
            "input": [
                {
                    "index": i,
                    "token": token.text,
                    "token_id": token.id,
                    "span": [token.start, token.stop],
                    "kind": token.kind.value,
                    "role": token.role,
                    "message": token.message,
                    "score": None if score is None else round(score, 6),
                }
                for i, (token, score) in enumerate(
                    zip(self.prompt.tokens, self.scores, strict=True)
                )
            ],
            "output": [
                {
                    "index": i,
                    "answer": token.answer,
                    "token": token.text,
                    "token_id": token.id,
                    "logprob": round(token.logprob, 6),
                }
                for i, token in enumerate(self.output)
            ],
            "summary": {
                "units": self.units,
                "sum": round(self.total, 6),
                "completeness_gap": _rounded(self.completeness_gap),
                "residual": _rounded(self.residual),
                "error_bound": _rounded(self.error_bound),
                "max_abs": round(self.max_abs, 6),
            },
            "usage": {
                "prompt_tokens": len(self.prompt.tokens),
                "completion_tokens": len(self.output),
                "total_tokens": len(self.prompt.tokens) + len(self.output),
                "forward_passes": self.forward_rows,
                "backward_passes": self.backward_rows,
                "ms": round(self.seconds * 1000, 1),
            },
            **({} if self.faithfulness is None else {"faithfulness": self._faithfulness()}),
        }

    def _faithfulness(self) -> dict[str, Any]:
        assert self.faithfulness is not None
        found: dict[str, Any] = _all_rounded(self.faithfulness.to_dict())
        return {"units": "nats", **found}


def _all_rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _all_rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_all_rounded(part) for part in value]
    return round(value, 6) if isinstance(value, float) else value


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)

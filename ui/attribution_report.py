"""An attribution as people see it: pieces of text, their scores on a scale, and facts in words.

Works on the wire form, `Attribution.to_dict()`, so that it serves an answer of a server as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.ui.attribution_scores import Scores
from trimtab.ui.receipt_line import receipt_line

UNIT = "nats"
# A sum is called exact up to here; the wire rounds each of its parts to 6 decimals.
_EXACT = 1e-3
# A larger share of the difference that is missed makes even the ranking doubtful.
_DOUBTFUL = 0.25
# A fit that explains less says little about any one token.
_EXPLAINED = 0.5


@dataclass(frozen=True)
class Report(Scores):
    """An attribution with what is known beside it.

    Attributes:
        result: the wire form; `steering` in it is the receipt of what steered the model.
        answers: each answer's text by its name (`target`, or `preferred` and `dispreferred`).
        is_generated: the model gave the answer itself.
        scale: as for `Scores`.
    """

    result: Mapping[str, Any]
    answers: Mapping[str, str] = field(default_factory=dict)
    is_generated: bool = False
    scale: float | None = None

    @property
    def tokens(self) -> Sequence[dict[str, Any]]:
        """The prompt's tokens, first to last."""
        tokens: Sequence[dict[str, Any]] = self.result["input"]
        return tokens

    @property
    def unit(self) -> str:
        """What the scores are in."""
        unit: str = self.result["summary"]["units"]
        return unit

    # --- in words

    def heading(self, answer: str) -> str:
        """Return what an answer is called."""
        if self.is_generated and answer != "dispreferred":
            return "The model's own answer"
        return "Answer" if answer == "target" else f"{answer.capitalize()} answer"

    @property
    def question(self) -> str:
        """What F is."""
        is_contrast = self.result["objective"]["kind"] == "logprob_contrast"
        what = "log P(preferred) - log P(dispreferred)" if is_contrast else "log P(answer)"
        each = ", each a mean over its tokens" if is_contrast else ", a mean over its tokens"
        return what + (each if self.result["objective"]["length_normalized"] else "")

    @property
    def values(self) -> str:
        """F at the prompt and at the baseline."""
        objective = self.result["objective"]
        with_words, without = objective["value"], objective["baseline_value"]
        return (
            f"F = {self.question} = {with_words:+.3f} nats; with its words taken away (baseline "
            f"{self.result['params']['baseline']}) {without:+.3f}."
        )

    @property
    def completeness(self) -> str:
        """Whether the scores sum to the difference, and what had to be handed out for it."""
        summary, objective = self.result["summary"], self.result["objective"]
        total, residual = summary["sum"], summary["residual"]
        difference = objective["value"] - objective["baseline_value"]
        if self.unit != UNIT:
            return "The scores are shares of all that counts, not nats, and sum to 1."
        if residual is None:
            return f"The scores sum to {total:+.3f}; {self.result['method']} promises no sum."
        told = f"The scores sum to {total:+.3f}"
        if abs(residual) < _EXACT:
            told += ", the difference between the two."
        elif abs(summary["completeness_gap"]) < _EXACT:
            told += (
                f", the difference between the two, after a residual of {residual:+.3f} was "
                "handed out."
            )
        else:
            told += f", the difference between the two is {difference:+.3f}: a residual of "
            told += f"{residual:+.3f}."
        if summary["error_bound"] is not None and summary["error_bound"] >= _EXACT:
            told += f" Together they may be {summary['error_bound']:.3f} off."
        if "explained" in self.result["params"]:
            told += f" They explain {self.result['params']['explained']:.1%} of how F varied."
        return told

    @property
    def faithfulness(self) -> str | None:
        """How the scores fare when tokens are taken away, beside permuted ones, if measured."""
        found = self.result.get("faithfulness")
        if found is None:
            return None
        area, loss = found["delta_af"], found["aopc"]
        return (
            f"Faithfulness: taking the lowest first instead of the highest is worth "
            f"{area['value']:+.3f} nats (the same scores in random places {area['control']:+.3f}, "
            f"sd {area['control_sd']:.3f}); without the highest half F loses up to "
            f"{loss['value']:+.3f} nats on average (random {loss['control']:+.3f})."
        )

    @property
    def doubt(self) -> str | None:
        """A warning, where too much is missed to trust the scores, with what mends it."""
        if self.warning is None:
            return None
        told, remedy = self.warning
        options = " ".join(f"--set {name}={value}" for name, value in remedy.items())
        return f"{told} Try {options}." if remedy else told

    @property
    def warning(self) -> tuple[str, dict[str, int]] | None:
        """The same in two parts: the sentence, and the method's options that mend it."""
        objective, summary = self.result["objective"], self.result["summary"]
        params = self.result["params"]
        if params.get("explained", 1.0) < _EXPLAINED:
            told = "That is little: do not trust the order of these scores."
            return told, {"samples": 4 * params["samples"]}
        # Others than a path integral may miss much of the difference and still rank well.
        if summary["error_bound"] is None or summary["residual"] is None:
            return None
        difference = abs(objective["value"] - objective["baseline_value"])
        if abs(summary["residual"]) <= max(_DOUBTFUL * difference, _EXACT):
            return None
        told = (
            f"What was missed is over {_DOUBTFUL:.0%} of the difference: do not trust the order of "
            "these scores."
        )
        return told, {"points": 2 * params["points"] - 1} if "points" in params else {}

    @property
    def steering(self) -> str | None:
        """What steered the model; None if nothing did."""
        receipt = self.result.get("steering")
        return None if receipt is None else receipt_line(receipt)

    @property
    def work(self) -> str:
        """How it was computed and what it took."""
        usage, result = self.result["usage"], self.result
        return (
            f"{result['method']} on {result['model']} in {result['dtype']}: "
            f"{_counted(usage['forward_passes'], 'pass', 'passes')}, "
            f"{_counted(usage['backward_passes'], 'gradient', 'gradients')}, "
            f"{usage['ms'] / 1000:.1f} s."
        )

    def tokens_of(self, answer: str) -> list[Mapping[str, Any]]:
        """Return the tokens of an answer, with their log-probabilities."""
        return [token for token in self.result["output"] if token["answer"] == answer]


def _counted(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"

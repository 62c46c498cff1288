"""An attribution's wire form made by hand, for what only shows it."""

from __future__ import annotations

from typing import Any

Token = tuple[str, float | None]


def wire(*tokens: Token, text: str | None = None, **changes: Any) -> dict[str, Any]:
    """Return `Attribution.to_dict()` of a prompt with these pieces and scores; None is template."""
    scores = [score for _, score in tokens if score is not None]
    at = 0
    items = []
    for i, (piece, score) in enumerate(tokens):
        items.append(
            {
                "index": i,
                "token": piece,
                "token_id": 100 + i,
                "span": [at, at + len(piece)],
                "kind": "template" if score is None else "text",
                "role": None if score is None else "user",
                "message": None if score is None else 0,
                "score": score,
            }
        )
        at += len(piece)
    summary = {
        "units": "nats",
        "sum": sum(scores),
        "completeness_gap": None,
        "residual": None,
        "error_bound": None,
        "max_abs": max(map(abs, scores), default=0.0),
    }
    return {
        "model": "toy",
        "method": changes.get("method", "attnlrp"),
        "params": {"baseline": "zero", **changes.get("params", {})},
        "dtype": "float32",
        "objective": {
            "kind": "logprob",
            "length_normalized": False,
            "value": -1.0,
            "baseline_value": -3.0,
            "units": "nats",
            **changes.get("objective", {}),
        },
        "text": "".join(piece for piece, _ in tokens) if text is None else text,
        "input": items,
        "output": [
            {"index": 0, "answer": "target", "token": "Yes", "token_id": 7, "logprob": -1.0}
        ],
        "summary": {**summary, **changes.get("summary", {})},
        "usage": {
            "prompt_tokens": len(tokens),
            "completion_tokens": 1,
            "total_tokens": len(tokens) + 1,
            "forward_passes": 3,
            "backward_passes": 1,
            "ms": 12.0,
        },
        **changes.get("more", {}),
    }

"""What /docs shows of a build's body: examples to try, and what a row of its data is."""

from __future__ import annotations

from typing import Any

EXAMPLES: dict[str, Any] = {
    "concept": {
        "summary": "A vector from a bundled concept",
        "value": {"kind": "vector", "id": "warm", "concept": "warm"},
    },
    "describe": {
        "summary": "A vector from two descriptions, which the model answers under",
        "value": {
            "kind": "vector",
            "id": "brief",
            "describe": "brief and to the point",
            "against": "long-winded",
            "method": "pca",
            "params": {"pairing": "diff"},
        },
    },
    "pairs": {
        "summary": "A vector from pairs of answers; forty or more make a useful one",
        "value": {
            "kind": "vector",
            "id": "polite",
            "pairs": [
                {
                    "prompt": "Can you help me?",
                    "preferred": "Certainly, with pleasure.",
                    "dispreferred": "If I must.",
                }
            ],
        },
    },
    "classifier": {
        "summary": "A classifier of five tones, from the model's own answers",
        "value": {
            "kind": "classifier",
            "id": "tone",
            "bundled": "tone",
            "own_answer_tokens": 48,
        },
    },
}

PAIRS: dict[str, Any] = {
    "type": "array",
    "items": {
        "oneOf": [
            {
                "type": "object",
                "additionalProperties": False,
                "required": list(required),
                "properties": {name: {"type": "string"} for name in required}
                | {"split": {"enum": ["build", "held"]}},
            }
            for required in (("prompt", "preferred", "dispreferred"), ("positive", "negative"))
        ]
    },
}
TEXTS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["text"],
        "properties": {
            "text": {"type": "string"},
            "label": {"type": "string"},
            "labels": {"type": "array", "items": {"type": "string"}},
            "prompt": {"type": "string"},
            "split": {"enum": ["build", "held"]},
        },
    },
}

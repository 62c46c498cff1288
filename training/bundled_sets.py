"""What can be built without data of one's own: the bundled pairs and instructions, as cards.

Cards are plain JSON, the same on the wire and from the command line.
"""

from __future__ import annotations

from typing import Any

from trimtab.training.vectors import pairs


def vector_concepts() -> list[dict[str, Any]]:
    """Return a card for each bundled set of pairs, by id.

    Returns:
        `id`, `kind`, `n_build` and `n_held` pairs, and an `example`: one pair's `preferred` and
        `dispreferred` answers, with its `prompt` if it has one.
    """
    cards = []
    for name in pairs.concepts():
        data = pairs.concept(name)
        first = data.build[0]
        prompt = {"prompt": first.prompt} if first.prompt else {}
        cards.append(
            {
                "id": name,
                "kind": "vector",
                "n_build": len(data.build),
                "n_held": len(data.held),
                "example": {
                    **prompt,
                    "preferred": first.preferred,
                    "dispreferred": first.dispreferred,
                },
            }
        )
    return cards


def classifier_concepts() -> list[dict[str, Any]]:
    """Return a card for each bundled set of labelled instructions, by id.

    Returns:
        `id`, `kind`, its `labels`, and `n_examples`: labels times questions.
    """
    # Here and not above: it brings torch, and the vectors' cards need none.
    from trimtab.training.classifiers import readers

    sets = {name: readers.bundled(name) for name in readers.bundled_names()}
    return [
        {
            "id": name,
            "kind": "classifier",
            "labels": list(data.labels),
            "n_examples": len(data.examples),
        }
        for name, data in sets.items()
    ]

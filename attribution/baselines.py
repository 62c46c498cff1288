"""What stands in for a token that is taken away."""

from __future__ import annotations

import torch

from trimtab.attribution.errors import AttributionError
from trimtab.attribution.subject import Subject
from trimtab.steering.errors import did_you_mean, listed

BASELINES = {
    "zero": "the zero embedding",
    "pad": "the embedding of the pad token (the end token where there is none)",
    "mean": "the mean embedding of the vocabulary",
    "drop": "nothing: no token attends to it (methods without gradients only)",
}


def baseline_row(subject: Subject, name: str) -> torch.Tensor:
    """Return the embedding that replaces a token, `[d_model]`, float32.

    Args:
        subject: the model.
        name: a key of `BASELINES`; `drop` replaces nothing and gives zeros.

    Raises:
        AttributionError: unknown name, or `pad` and the tokenizer has neither pad nor end token.
    """
    if name not in BASELINES:
        raise AttributionError(
            f"There is no baseline {name!r}.{did_you_mean(name, BASELINES)} "
            f"Known: {listed(BASELINES)}.",
            param="params.baseline",
        )
    if name == "mean":
        return subject.mean_embedding()
    if name == "pad":
        token = subject.tokenizer.pad_token_id
        token = subject.tokenizer.eos_token_id if token is None else token
        if token is None:
            raise AttributionError(
                "This model's tokenizer has neither a pad nor an end token; use another baseline.",
                param="params.baseline",
            )
        return subject.embeddings([token])[0]
    return torch.zeros(subject.profile.ref.hidden_size, device=subject.device)

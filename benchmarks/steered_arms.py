"""What the throughput benchmarks ask of an engine: prompts, and one plan a request for each arm.

    different     a vector of one's own, one layer
    four          four vectors of one's own summed on all layers, norm preserved
    guided        labels of one's own of one classifier (128 hidden units, 16 labels), one layer,
                  three steps

Read by `serving.py`, `vllm_engine.py` and `gpu/run.py`; there is nothing to run here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from trimtab.kernels import Classifier
from trimtab.steering.plan import Guide, LayerTerm, Plan, Reader, additive_plan, plan_of

N_LABELS = 16

TOPICS = (
    "a lighthouse", "the tides", "a bakery", "old maps", "a mountain railway", "beekeeping",
    "a village school", "glass", "rain", "a wooden boat", "clocks", "a market day", "salt",
    "night trains", "apple trees", "a small museum",
)  # fmt: skip


def prompts(tokenizer: Any, n: int) -> list[tuple[int, ...]]:
    """Return n different chat prompts as token ids."""
    rows = []
    for i in range(n):
        text = f"Write part {i // len(TOPICS) + 1} of a story about {TOPICS[i % len(TOPICS)]}."
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        rows.append(tuple(ids))
    return rows


def random_prompts(n: int, *, length: int) -> list[tuple[int, ...]]:
    """Return n different prompts of token ids below 1000, which every vocabulary has."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 1000, (n, length), generator=generator)
    return [tuple(row) for row in ids.tolist()]


class ArmPlans:
    """The plans of every arm, the same for the same sizes.

    Args:
        norms: typical |h| of each layer, `[n_layers]`; doses are relative to it.
        width: of the residual stream.
        most: requests at once.
    """

    def __init__(self, norms: Sequence[float], *, width: int, most: int) -> None:
        self.norms = [float(norm) for norm in norms]
        self.layer = len(self.norms) // 2
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(most * 4, width, generator=generator)
        self.rows = rows / rows.norm(dim=1, keepdim=True)
        self.reader = self._classifier(width, generator)
        every = dict.fromkeys(range(len(self.norms)), 0.02)
        self.plans: dict[str, list[Plan]] = {
            "different": [self._added({self.layer: 0.1}, i) for i in range(most)],
            "four": [self._added(every, i, n_vectors=4, normalize=True) for i in range(most)],
            "guided": [self._guided(i) for i in range(most)],
        }

    def _added(
        self, doses: dict[int, float], i: int, *, n_vectors: int = 1, normalize: bool = False
    ) -> Plan:
        direction = self.rows[i * 4 : i * 4 + n_vectors].sum(0)
        return additive_plan(
            {layer: direction * dose * self.norms[layer] for layer, dose in doses.items()},
            normalize=normalize,
        )

    def _guided(self, i: int) -> Plan:
        toward, away = (i % N_LABELS,), ((i + 1 + i // N_LABELS) % N_LABELS,)
        size = 0.1 * self.norms[self.layer] / 3
        guide = Guide(self.reader, toward, away, (size,) * 3, loss="softmax")
        return plan_of({self.layer: LayerTerm(guides=(guide,))})

    def _classifier(self, width: int, generator: torch.Generator) -> Reader:
        sizes = [width, 128, 128, N_LABELS]
        network = Classifier.of(
            [
                (torch.randn(m, n, generator=generator) / n**0.5, torch.zeros(m))
                for n, m in itertools.pairwise(sizes)
            ],
            is_exclusive=True,
        )
        labels = tuple(f"label-{i}" for i in range(N_LABELS))
        return Reader("bench", self.layer, network, labels, "bench")

"""Tones held together: K-Steering against sums of CAA vectors and against asking, on ToneBank.

    TRIMTAB_DATA=... python benchmarks/tonebank.py results.json      # forty minutes on one core

Every style instruction is put to half A and half B of the questions, and the model's answers are
kept. On half A's, classifiers and CAA vectors are built. On half B's the judge is: it reads the
answer's mean hidden state behind the bare question, unsteered, and its layer is the one that tells
most held answers' styles. A second judge reads the words alone.

Single tones, pairs and triples are steered on 40 questions of half B that nothing else has seen. A
set's score is the mean over its tones of p(tone | steered answer) - p(tone | unsteered answer), by
each tone's own sigmoid. Steering acts from the prompt's last token on.

Every method and set of tones has the largest dose at which at most 5 % of the answers to 40
questions of half A are incoherent (`training/coherence.py`). Layers, states and losses were chosen
on the same questions by the mean score of pairs at that damage, from 18 settings for CAA and 36 for
K-Steering: docs/LOG.md has the list. Results are kept as they come; a second run goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import nn
from transformers import DynamicCache

from trimtab.kernels import Classifier, read
from trimtab.steering.bank import Bank
from trimtab.steering.model.hooks import captured, steered
from trimtab.steering.model.loading import load_model
from trimtab.steering.model.profile import profile_model
from trimtab.steering.plan import Guide, LayerTerm, Plan, Reader, additive_plan, plan_of
from trimtab.steering.steered_request import SteeredRequest
from trimtab.steering.step import Span, SteerStep
from trimtab.training.coherence import MAX_SHARE, Coherence, Signs
from trimtab.training.repetition import repetition
from trimtab.training.scoring import Generation, answer_of, end_tokens
from trimtab.training.steered_model import SteeredModel

LAYERS = (9, 12, 15, 18, 21, 24, 27)
N_BUILD_TOKENS, N_TOKENS = 48, 32
N_TRAIN_A, N_CHOOSE, N_TRAIN_B, N_HELD, N_TEST = 150, 40, 180, 60, 40
CAA: dict[str, Any] = {"positions": ("prompt",), "layers": (15, 18, 21)}
K_STEERING: dict[str, Any] = {
    "positions": ("inside",),
    "layers": (12, 15, 18),
    "loss": "softmax",
    "avoids_others": True,
    "keeps_norm": True,
    "until": None,
    "hidden": 128,
    "epochs": 8,
    "noise": 2.0,
    "is_exclusive": True,
    "lr": 2e-3,
    "scales_features": False,
}
LINEAR: dict[str, Any] = {
    "positions": ("plain", "inside"),
    "layers": (12, 15, 18),
    "loss": "logits",
    "avoids_others": True,
    "keeps_norm": False,
    "until": None,
    "hidden": 0,
    "epochs": 6,
    "noise": 0.5,
}
COLUMNS = ("prompting", "CAA", "K-Steering 1", "K-Steering 3", "linear")
FIRST_DOSE = {"CAA": 0.09, "K-Steering 1": 0.095, "K-Steering 3": 0.1, "linear": 0.11}
N_ROUNDS, WIDER = 3, 1.3
_MAX_ROWS = 128


@dataclass(frozen=True)
class Split:
    """Questions, no text in two of them."""

    train_a: list[str]  # half A: steering is built on them
    choose: list[str]  # half A: layers, doses, settings
    train_b: list[str]  # half B: the judge is built on them
    held_b: list[str]  # half B: the judge's layer and accuracy
    test: list[str]  # half B: run once

    @classmethod
    def of(cls, texts: Sequence[str]) -> Split:
        once = list(dict.fromkeys(texts))
        random.Random(0).shuffle(once)
        half = len(once) // 2
        a, b = iter(once[:half]), iter(once[half:])

        def take(source: Any, n: int) -> list[str]:
            return [next(source) for _ in range(n)]

        return cls(
            take(a, N_TRAIN_A),
            take(a, N_CHOOSE),
            take(b, N_TRAIN_B),
            take(b, N_HELD),
            take(b, N_TEST),
        )


class Fleet:
    """Generates under many plans at once, and reads answers; prompts' prefixes are run once.

    Steering acts from the prompt's last token on.
    """

    def __init__(self, host: SteeredModel) -> None:
        self.host = host
        self.ends = end_tokens(host)
        self.prefixes: dict[tuple[int, ...], torch.Tensor] = {}
        self.bank = Bank(
            n_layers=len(host.profile.layers),
            hidden_size=host.profile.ref.hidden_size,
            device=host.device,
            max_slots=64,
        )

    @torch.inference_mode()
    def run_prompts(self, prompts: Sequence[tuple[int, ...]], *, n_shared: int = 0) -> None:
        """Keep the keys and values of prompts' tokens but the last.

        The first `n_shared` tokens are the same in all of them and run once.
        """
        missing = [p for p in dict.fromkeys(prompts) if p not in self.prefixes]
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for prompt in missing:
            by_length.setdefault(len(prompt), []).append(prompt)
        shared = DynamicCache()
        if n_shared and missing:
            self.host.model.base_model(
                input_ids=torch.tensor([missing[0][:n_shared]]),
                use_cache=True,
                past_key_values=shared,
            )
        for same in by_length.values():
            for at in range(0, len(same), 16):
                rows = same[at : at + 16]
                cache = DynamicCache()
                for n, layer in enumerate(shared.layers):
                    part = (x.expand(len(rows), -1, -1, -1) for x in (layer.keys, layer.values))
                    cache.update(*part, n)
                self.host.model.base_model(
                    input_ids=torch.tensor([row[n_shared:-1] for row in rows]),
                    use_cache=True,
                    past_key_values=cache,
                )
                for r, row in enumerate(rows):
                    self.prefixes[row] = torch.stack(
                        [torch.stack((x.keys[r], x.values[r])) for x in cache.layers]
                    )

    def batch_of(
        self, prompts: Sequence[tuple[int, ...]], n_new: int
    ) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
        """Return caches padded on the left, the mask of them and `n_new` tokens, and positions."""
        lengths = [len(p) - 1 for p in prompts]
        longest = max(lengths)
        first = self.prefixes[prompts[0]]
        n_layers, _, n_heads, _, width = first.shape
        both = torch.zeros(n_layers, 2, len(prompts), n_heads, longest, width, dtype=first.dtype)
        mask = torch.zeros(len(prompts), longest + n_new, dtype=torch.int64)
        for r, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
            both[:, :, r, :, longest - n :] = self.prefixes[prompt]
            mask[r, longest - n :] = 1
        cache = DynamicCache()
        for n in range(n_layers):
            cache.update(both[n, 0], both[n, 1], n)
        positions = torch.tensor(lengths)[:, None] + torch.arange(n_new)
        return cache, mask, positions

    @torch.inference_mode()
    def generate(
        self,
        jobs: Sequence[tuple[tuple[int, ...], Plan | None]],
        *,
        n_tokens: int = N_TOKENS,
        layers: Sequence[int] = (),
    ) -> tuple[list[Generation], list[torch.Tensor]]:
        """Continue prompts under plans.

        Returns:
            The generations, and of each the hidden states `[n_tokens, n_layers, d]`, float16, at
            `layers`: of the prompt's last token first, then of the answer's tokens.
        """
        self.run_prompts([prompt for prompt, _ in jobs])
        order = sorted(range(len(jobs)), key=lambda i: len(jobs[i][0]))
        found: list[Any] = [None] * len(jobs)
        for at in range(0, len(jobs), _MAX_ROWS):
            rows = order[at : at + _MAX_ROWS]
            done = self._continue([jobs[i] for i in rows], n_tokens, layers)
            for i, one in zip(rows, done, strict=True):
                found[i] = one
        return [g for g, _ in found], [h for _, h in found]

    def _continue(
        self,
        jobs: Sequence[tuple[tuple[int, ...], Plan | None]],
        n_tokens: int,
        layers: Sequence[int],
    ) -> list[tuple[Generation, torch.Tensor]]:
        host = self.host
        prompts = [prompt for prompt, _ in jobs]
        cache, mask, positions = self.batch_of(prompts, n_tokens)
        n_before = mask.shape[1] - n_tokens
        leases = [None if p is None or not p.parts else self.bank.acquire(p) for _, p in jobs]
        requests = [None if lease is None else SteeredRequest(lease, 0) for lease in leases]
        ids = torch.tensor([prompt[-1:] for prompt in prompts])
        new: list[list[int]] = [[] for _ in jobs]
        entropies: list[list[float]] = [[] for _ in jobs]
        is_open = [True] * len(jobs)
        states: list[torch.Tensor] = []
        for k in range(n_tokens):
            spans = [Span(1, k, request) for request in requests]
            step = SteerStep(self.bank, spans) if any(requests) else None
            with (
                steered(host.profile.layers, step),
                captured(host.profile.layers, layers) if layers else nullcontext({}) as seen,
            ):
                logits = host.model(
                    input_ids=ids,
                    attention_mask=mask[:, : n_before + k + 1],
                    position_ids=positions[:, k : k + 1],
                    use_cache=True,
                    past_key_values=cache,
                ).logits[:, -1]
            if layers:
                states.append(torch.stack([seen[n][:, -1].half() for n in layers], 1))
            logprobs = logits.float().log_softmax(-1)
            p = logprobs.exp()
            entropy = (-(p * logprobs).sum(-1)).tolist()
            ids = logprobs.argmax(-1, True)
            for r, token in enumerate(ids[:, 0].tolist()):
                if is_open[r]:
                    new[r].append(token)
                    entropies[r].append(entropy[r])
                    is_open[r] = token not in self.ends
            if not any(is_open):
                break
        for lease in leases:
            if lease is not None:
                self.bank.release(lease)
        hidden = torch.stack(states, 1) if layers else torch.zeros(len(jobs), 0)
        return [
            (Generation(tuple(row), sum(e) / len(e)), hidden[r, : len(row)].clone())
            for r, (row, e) in enumerate(zip(new, entropies, strict=True))
        ]

    @torch.inference_mode()
    def read(
        self,
        prompts: Sequence[tuple[int, ...]],
        generations: Sequence[Generation],
        *,
        layers: Sequence[int] = (),
    ) -> tuple[list[Signs], list[torch.Tensor]]:
        """Run answers unsteered behind their prompts.

        Returns:
            Signs, and hidden states of the answers' tokens without an end mark,
            `[n_tokens, n_layers, d]`, float16.
        """
        self.run_prompts(prompts)
        texts = [g.ids[: len(g.ids) - (g.ids[-1] in self.ends)] for g in generations]
        signs: list[Any] = [None] * len(texts)
        hidden: list[Any] = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for at in range(0, len(order), 32):
            rows = order[at : at + 32]
            ids = self.host.pad([(prompts[i][-1], *texts[i]) for i in rows])
            cache, mask, positions = self.batch_of([prompts[i] for i in rows], ids.shape[1])
            with captured(self.host.profile.layers, layers) if layers else nullcontext({}) as seen:
                logits = self.host.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    use_cache=True,
                    past_key_values=cache,
                ).logits
            for r, i in enumerate(rows):
                n = len(texts[i])
                part = logits[r, :n].float()
                own = part.gather(1, ids[r, 1 : n + 1, None])[:, 0] - part.logsumexp(-1)
                surprise = float(-own.mean()) if n else float("inf")
                g = generations[i]
                signs[i] = Signs(n, surprise, repetition(texts[i]), g.entropy)
                if layers:
                    hidden[i] = torch.stack([seen[k][r, 1 : n + 1].half() for k in layers], 1)
        return signs, hidden


class Judge:
    """Reads an answer's mean hidden state at one layer; each label's own sigmoid."""

    def __init__(self, layer: int, states: torch.Tensor, labels: torch.Tensor) -> None:
        self.layer = layer
        self.classifier = fit(states, labels, hidden=128, epochs=20, batch=64, lr=1e-3)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return read(states, self.classifier)

    def __call__(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.logits(pooled(hidden)).sigmoid()


def pooled(hidden: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return each answer's mean state, `[n, d]`; zeros for an empty answer."""
    return torch.stack([h.float().mean(0) for h in hidden]).nan_to_num()


def fit(
    states: torch.Tensor,
    labels: torch.Tensor,
    *,
    hidden: int = 0,
    epochs: int = 3,
    noise: float = 0.0,
    is_exclusive: bool = False,
    scales_features: bool = True,
    batch: int = 512,
    lr: float = 3e-3,
) -> Classifier:
    """Return a classifier of states, its standardisation folded into its first layer.

    Args:
        states: `[n, d]`, float32.
        labels: `[n]`, int64.
        hidden: width of two hidden layers; 0 makes it linear.
        epochs: passes over the states.
        noise: standard deviation of what is added to standardised states, in theirs.
        is_exclusive: cross-entropy instead of a loss of each label's own.
        scales_features: standardise each feature, rather than all by one deviation.
        batch: states a step.
        lr: of AdamW, whose weight decay is 0.1.
    """
    torch.manual_seed(0)
    n_labels = int(labels.max()) + 1
    mean, std = states.mean(0), states.std(0).clamp_min(1e-6)
    if not scales_features:
        std = std.square().mean().sqrt().expand_as(std)
    widths = [states.shape[1], *([hidden, hidden] if hidden else []), n_labels]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    net = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.1)
    targets = nn.functional.one_hot(labels, n_labels).float()
    score = (
        nn.functional.cross_entropy
        if is_exclusive
        else (nn.functional.binary_cross_entropy_with_logits)
    )
    z = (states - mean) / std
    for _ in range(epochs):
        for rows in torch.randperm(len(z)).split(batch):
            x = z[rows] + noise * torch.randn(len(rows), z.shape[1])
            optimizer.zero_grad()
            score(net(x), targets[rows]).backward()
            optimizer.step()
    weights = [(layer.weight.detach(), layer.bias.detach()) for layer in layers]
    first, bias = weights[0]
    weights[0] = (first / std, bias - (first / std) @ mean)
    return Classifier.of(weights, is_exclusive=is_exclusive)


class Bench:
    def __init__(self, path: Path, cache: Path) -> None:
        self.path, self.cache = path, cache
        self.done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        loaded = load_model("smollm2", device="cpu", dtype="bfloat16")
        loaded.model.set_attn_implementation("eager")  # twice as fast as sdpa for single tokens
        profile = profile_model(loaded.model, model_id=loaded.id, tokenizer=loaded.tokenizer)
        self.host = SteeredModel(loaded, profile)
        self.norms = profile.hidden_norms
        self.fleet = Fleet(self.host)
        data = Path(os.environ["TRIMTAB_DATA"]) / "tonebank"
        lines = (data / "questions.jsonl").read_text().splitlines()
        self.split = Split.of([json.loads(line)["text"] for line in lines])
        self.styles = json.loads((data / "style_instructions.json").read_text())
        self.labels = list(self.styles)
        self.sets = [
            labels
            for n in (1, 2, 3)
            for labels in itertools.combinations(range(len(self.labels)), n)
        ]

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return a result, measured now unless an earlier run did."""
        if key not in self.done:
            began = time.perf_counter()
            self.done[key] = measure()
            self.path.write_text(json.dumps(self.done, indent=1))
            print(f"{time.perf_counter() - began:6.1f} s  {key}", file=sys.stderr, flush=True)
        return self.done[key]

    def named(self, labels: Sequence[int]) -> str:
        return "+".join(self.labels[n] for n in labels)

    def prompt(self, text: str) -> tuple[int, ...]:
        answer = answer_of(self.host.tokenizer, text, "")
        return answer.ids[: answer.n_prompt]

    def text(self, generation: Generation) -> str:
        return str(self.host.tokenizer.decode(generation.ids, skip_special_tokens=True))

    def styled(self, name: str, *, keep_states: bool = False) -> dict[str, Any]:
        """Return answers given under every instruction, and their states without it."""
        path = self.cache / f"styled_{name}.pt"
        if path.exists():
            with torch.serialization.safe_globals([Generation, Signs]):
                return torch.load(path, weights_only=True)
        questions = getattr(self.split, name)
        rows = [(q, s) for s in range(len(self.labels)) for q in range(len(questions))]
        prompts = []
        for label in self.labels:
            of_style = [self.prompt(self.styles[label] + "\n" + q) for q in questions]
            columns = enumerate(zip(*of_style, strict=False))
            n_shared = next(i for i, column in columns if len(set(column)) > 1)
            self.fleet.run_prompts(of_style, n_shared=n_shared)
            prompts += of_style
        layers = LAYERS if keep_states else ()
        generations, inside = self.fleet.generate(
            [(p, None) for p in prompts], n_tokens=N_BUILD_TOKENS, layers=layers
        )
        self.fleet.prefixes.clear()
        plain = [self.prompt(questions[q]) for q, _ in rows]
        _, hidden = self.fleet.read(plain, generations, layers=LAYERS)
        self.fleet.prefixes.clear()
        found = {
            "labels": torch.tensor([s for _, s in rows]),
            "texts": [self.text(g) for g in generations],
            "hidden": hidden,
            "inside": inside,
        }
        torch.save(found, path)
        return found

    def judges(self) -> tuple[Judge, Any]:
        """Return the judge, of the layer best on held questions, and one that reads words."""
        built, held = self.styled("train_b"), self.styled("held_b")

        def at(found: dict[str, Any], n: int) -> torch.Tensor:
            return pooled([h[:, n] for h in found["hidden"]])

        made = {}
        for n, layer in enumerate(LAYERS):
            judge = Judge(layer, at(built, n), built["labels"])
            right = judge.logits(at(held, n)).argmax(1) == held["labels"]
            made[layer] = (judge, right)
        best = max(made, key=lambda layer: float(made[layer][1].float().mean()))
        words = make_pipeline(
            TfidfVectorizer(
                ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\w+|[^\w\s]|\n"
            ),
            LogisticRegression(C=10, max_iter=1000),
        ).fit(built["texts"], built["labels"].numpy())
        told = torch.tensor(words.predict(held["texts"])) == held["labels"]

        def accuracy(right: torch.Tensor) -> dict[str, float]:
            each = {
                name: float(right[held["labels"] == n].float().mean())
                for n, name in enumerate(self.labels)
            }
            return {"all": float(right.float().mean()), **each}

        self.done["judge"] = {
            "layer": best,
            "accuracy by layer": {k: float(r.float().mean()) for k, (_, r) in made.items()},
            "accuracy": accuracy(made[best][1]),
            "accuracy of words": accuracy(told),
        }
        return made[best][0], words

    def material(self, positions: Sequence[str], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return half A's states at a layer and their labels.

        Args:
            positions: `prompt` (the instructed prompt's last token), `inside` (an answer's tokens
                behind its instruction), `plain` (the same tokens behind the bare question).
            layer: whose output.
        """
        found, n = self.styled("train_a", keep_states=True), LAYERS.index(layer)
        parts = {
            "prompt": [h[:1, n].float() for h in found["inside"]],
            "inside": [h[1:, n].float() for h in found["inside"]],
            "plain": [h[:, n].float() for h in found["hidden"]],
        }
        states = [h for position in positions for h in parts[position]]
        labels = [y for _ in positions for y in found["labels"].tolist()]
        each = [torch.full((len(h),), y) for h, y in zip(states, labels, strict=True)]
        return torch.cat(states), torch.cat(each)

    def methods(self) -> dict[str, Callable[[tuple[int, ...], float], Plan]]:
        """Return what makes a plan of labels and a dose."""
        return {
            "CAA": self._caa(**CAA),
            "K-Steering 1": self._guided(**K_STEERING, n_steps=1),
            "K-Steering 3": self._guided(**K_STEERING, n_steps=3),
            # The gradient of a linear classifier's logits is one direction: steps are all alike.
            "linear": self._guided(**LINEAR, n_steps=1),
        }

    def _caa(
        self, *, positions: Sequence[str], layers: Sequence[int]
    ) -> Callable[[tuple[int, ...], float], Plan]:
        units = {}
        for layer in layers:
            states, labels = self.material(positions, layer)
            means = torch.stack([states[labels == n].mean(0) for n in range(len(self.labels))])
            rows = means - (means.sum(0) - means) / (len(means) - 1)
            units[layer] = rows / rows.norm(dim=1, keepdim=True)

        def plan(labels: tuple[int, ...], dose: float) -> Plan:
            sums = {n: rows[list(labels)].sum(0) for n, rows in units.items()}
            return additive_plan({n: s / s.norm() * dose * self.norms[n] for n, s in sums.items()})

        return plan

    def _guided(
        self,
        *,
        positions: Sequence[str],
        layers: Sequence[int],
        n_steps: int,
        loss: Any,
        avoids_others: bool,
        keeps_norm: bool,
        until: float | None,
        **fitting: Any,
    ) -> Callable[[tuple[int, ...], float], Plan]:
        readers = {
            n: Reader(
                "tones", n, fit(*self.material(positions, n), **fitting), tuple(self.labels), f"{n}"
            )
            for n in layers
        }

        def plan(labels: tuple[int, ...], dose: float) -> Plan:
            others = tuple(n for n in range(len(self.labels)) if n not in labels)
            return plan_of(
                {
                    n: LayerTerm(
                        guides=(
                            Guide(
                                reader,
                                labels,
                                others if avoids_others else (),
                                (dose * float(self.norms[n]) / n_steps,) * n_steps,
                                loss,
                                keeps_norm=keeps_norm,
                                until=until,
                            ),
                        )
                    )
                    for n, reader in readers.items()
                }
            )

        return plan

    def limits(self) -> Coherence:
        """Return what the unsteered model's own answers to the choosing questions allow."""

        def measure() -> dict[str, float]:
            prompts = [self.prompt(q) for q in self.split.choose]
            made, _ = self.fleet.generate([(p, None) for p in prompts], n_tokens=N_TOKENS)
            return asdict(Coherence.of(self.fleet.read(prompts, made)[0]))

        return Coherence(**self.once("limits", measure))

    def doses(
        self, method: str, plan: Callable[[tuple[int, ...], float], Plan]
    ) -> dict[str, float]:
        """Return the largest dose of each set within the limit, all sets searched at once."""
        limits = self.limits()
        prompts = [self.prompt(q) for q in self.split.choose]
        low: dict[tuple[int, ...], float] = {}
        high: dict[tuple[int, ...], float] = {}
        dose = dict.fromkeys(self.sets, FIRST_DOSE[method])
        for n in range(N_ROUNDS):

            def measure(dose: Any = dose) -> dict[str, Any]:
                jobs = [(p, plan(labels, dose[labels])) for labels in self.sets for p in prompts]
                made, _ = self.fleet.generate(jobs, n_tokens=N_TOKENS)
                signs, _ = self.fleet.read([p for p, _ in jobs], made)
                shares = {}
                for i, labels in enumerate(self.sets):
                    own = signs[i * len(prompts) : (i + 1) * len(prompts)]
                    shares[self.named(labels)] = (dose[labels], limits.share(own))
                return shares

            shares = self.once(f"damage {method} {n}", measure)
            for labels in self.sets:
                at, share = shares[self.named(labels)]
                if share <= MAX_SHARE:
                    low[labels] = max(at, low.get(labels, 0.0))
                else:
                    high[labels] = min(at, high.get(labels, math.inf))
                if labels in low and labels in high:
                    dose[labels] = math.sqrt(low[labels] * high[labels])
                else:
                    dose[labels] = at * (WIDER if labels in low else 1 / WIDER)
        # Where nothing passed, the next smaller dose, which nothing measured.
        return {self.named(labels): low.get(labels, dose[labels]) for labels in self.sets}

    def answered(
        self, jobs: dict[str, list[tuple[tuple[int, ...], Plan | None]]], judge: Judge, words: Any
    ) -> dict[str, Any]:
        """Return what judges say of the test questions' answers, and which are incoherent.

        Args:
            jobs: name -> a prompt and a plan for each test question.
            judge: reads hidden states.
            words: reads texts.
        """
        flat = [job for of_name in jobs.values() for job in of_name]
        made, _ = self.fleet.generate(flat, n_tokens=N_TOKENS)
        bare = [self.prompt(q) for q in self.split.test] * len(jobs)
        signs, hidden = self.fleet.read(bare, made, layers=(judge.layer,))
        texts = [self.text(g) for g in made]
        p = judge([h[:, 0] for h in hidden]).numpy().round(4).tolist()
        p_words = words.predict_proba(texts).round(4).tolist()
        is_bad = [self.limits().is_incoherent(one) for one in signs]
        found = {}
        for i, name in enumerate(jobs):
            at = slice(i * N_TEST, (i + 1) * N_TEST)
            found[name] = {
                "p": p[at],
                "p words": p_words[at],
                "incoherent": is_bad[at],
                "surprise": float(np.mean([one.surprise for one in signs[at] if one.n_tokens])),
                "texts": texts[at][:3],
            }
        return found

    def test(self) -> dict[str, dict[str, Any]]:
        """Return column -> set -> answers of the test questions."""
        judge, words = self.judges()
        methods = self.methods()
        doses = {name: self.doses(name, plan) for name, plan in methods.items()}
        self.done["settings"] = {"CAA": CAA, "K-Steering": K_STEERING, "linear": LINEAR}
        self.done["doses"] = doses
        bare = [self.prompt(q) for q in self.split.test]

        def measured(column: str, jobs: Any) -> dict[str, Any]:
            found: dict[str, Any] = self.once(
                f"test {column}", lambda: self.answered(jobs, judge, words)
            )
            return found

        base = measured("base", {"base": [(p, None) for p in bare]})["base"]
        columns = {"base": {self.named(labels): base for labels in self.sets}}
        for name, plan in methods.items():
            plans = {key: plan(labels, doses[name][key]) for key, labels in self.keyed().items()}
            jobs = {key: [(p, one) for p in bare] for key, one in plans.items()}
            columns[name] = measured(name, jobs)
        asked = {}
        for key, labels in self.keyed().items():
            tone = listed_in_words([self.labels[n] for n in labels])
            texts = [f"Answer in a {tone} tone.\n{q}" for q in self.split.test]
            asked[key] = [(self.prompt(text), None) for text in texts]
        columns["prompting"] = measured("prompting", asked)
        return columns

    def keyed(self) -> dict[str, tuple[int, ...]]:
        return {self.named(labels): labels for labels in self.sets}


def listed_in_words(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--cache", type=Path, help="folder of hidden states, beside the results")
    given = parser.parse_args()
    cache = given.cache or given.results.with_suffix(".cache")
    cache.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.results, cache)
    columns = bench.test()
    print(tables(bench, columns))


def tables(bench: Bench, columns: dict[str, dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    sizes = {1: "singles", 2: "pairs", 3: "triples"}
    sets = {n: [s for s in bench.sets if len(s) == n] for n in sizes}
    guided = COLUMNS[2:]
    resampled = np.random.default_rng(0).integers(0, N_TEST, (10_000, N_TEST))

    def score(column: str, labels: Sequence[int], by: str = "p") -> np.ndarray:
        steered, base = (
            np.array(columns[name][bench.named(labels)][by]) for name in (column, "base")
        )
        return (steered - base)[:, list(labels)].mean(1)

    def against_caa(column: str, n: int, by: str) -> list[str]:
        own, caa = (
            np.stack([score(name, labels, by) for labels in sets[n]]) for name in (column, "CAA")
        )
        # Questions are drawn again, the same ones for every set of tones and both columns.
        ratios = own.mean(0)[resampled].mean(1) / caa.mean(0)[resampled].mean(1)
        low, high = np.percentile(ratios, [2.5, 97.5])
        wins = int((own.mean(1) > caa.mean(1)).sum())
        ratio = own.mean() / caa.mean()
        return [f"{ratio:.2f} ({low:.2f} to {high:.2f})", f"{wins} of {len(own)}"]

    def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        lines = [header, ["---"] * len(header), *rows]
        return [f"| {' | '.join(line)} |" for line in lines] + [""]

    each = [
        [
            bench.named(labels),
            f"{np.array(columns['base'][bench.named(labels)]['p'])[:, list(labels)].mean():.3f}",
            *[f"{score(name, labels).mean():+.3f}" for name in COLUMNS],
            *[f"{dose[bench.named(labels)]:.3f}" for dose in bench.done["doses"].values()],
        ]
        for labels in bench.sets
    ]
    means, ratios, broken = [], [], []
    for n, size in sizes.items():
        for by, judge in (("p", "states"), ("p words", "words")):
            of_size = {
                name: np.mean([score(name, labels, by).mean() for labels in sets[n]])
                for name in COLUMNS
            }
            means.append([size, judge, *[f"{of_size[name]:+.3f}" for name in COLUMNS]])
            found = [cell for name in guided for cell in against_caa(name, n, by)]
            ratios.append([size, judge, *found])
        keys = [bench.named(labels) for labels in sets[n]]
        shares = [
            np.mean([columns[name][key]["incoherent"] for key in keys])
            for name in ("base", *COLUMNS)
        ]
        broken.append([size, *[f"{100 * share:.1f} %" for share in shares]])
    over_caa = [cell for name in guided for cell in (f"{name} / CAA (95 %)", "better in")]
    conflicts = [
        [
            bench.named(labels),
            *[
                f"{score(name, labels).mean() - np.mean(alone):+.3f}"
                for name in COLUMNS
                for alone in [[score(name, (n,)).mean() for n in labels]]
            ],
        ]
        for labels in sets[2]
    ]
    doses = [f"dose, {name}" for name in bench.done["doses"]]
    return "\n".join(
        [
            f"Judges: {json.dumps(bench.done['judge'])}",
            "",
            *table(["tones", "p unsteered", *COLUMNS, *doses], each),
            *table(["mean score", "judge", *COLUMNS], means),
            *table(["ratio of means", "judge", *over_caa], ratios),
            *table(["incoherent on test questions", "unsteered", *COLUMNS], broken),
            *table(["pair's score less its singles' mean", *COLUMNS], conflicts),
        ]
    )


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()

"""Do default guidance requests stay coherent, and how near is the cliff? On 200 varied questions.

    TRIMTAB_DATA=... python benchmarks/guidance_coherence.py tone     # a calibrated classifier's id

ToneBank's last 200 questions in file order, of 18 categories. Each is answered under one of the
classifier's label sets, each label alone and each pair, at 1, 1.25, 1.5, 2 and 3 times the
calibrated dose, greedily with 32 tokens. (Questions of similar length share a label set, because
prompts of one length are generated from together.) What counts as incoherent is
`training.coherence`, its limits fitted to the unsteered model's own answers to 60 other questions.
The first row is the unsteered model's own share, which loops by itself on some questions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections import Counter
from pathlib import Path

from trimtab.steering.classifier import ClassifierArtifact
from trimtab.steering.model.loading import load_model
from trimtab.steering.model.profile import profile_model
from trimtab.training.classifiers.doses import LabelSet, plan_at
from trimtab.training.coherence import Coherence, Signs, signs_of
from trimtab.training.scoring import answer_of, generate
from trimtab.training.steered_model import SteeredModel
from trimtab.ui.stores import store_of

N_QUESTIONS, N_LIMITS, N_TOKENS = 200, 60, 32
SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)

Ids = tuple[int, ...]


def questions() -> list[str]:
    """Return the questions to answer, then those the limits are fitted on."""
    data = os.environ.get("TRIMTAB_DATA")
    if not data:
        sys.exit("TRIMTAB_DATA must name the folder that holds tonebank")
    lines = (Path(data) / "tonebank" / "questions.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines[-(N_QUESTIONS + N_LIMITS) :]]


def label_sets(classifier: ClassifierArtifact) -> list[LabelSet]:
    """Return each label and each pair as a target."""
    sizes = (1, 2)
    return [
        LabelSet(target=some)
        for n in sizes
        for some in itertools.combinations(classifier.labels, n)
    ]


def answered(
    host: SteeredModel, classifier: ClassifierArtifact, prompts: list[Ids], scale: float
) -> list[Signs]:
    """Return the signs of the prompts' answers, a label set each share of them."""
    sets = label_sets(classifier)
    by_length = sorted(prompts, key=len)
    found: list[Signs] = []
    for k, labels in enumerate(sets):
        n = len(by_length)
        rows = by_length[k * n // len(sets) : (k + 1) * n // len(sets)]
        safe = classifier.safe_dose(labels.target, labels.avoid)
        if safe is None:
            sys.exit(f"{classifier.id} is not calibrated: trimtab classifiers calibrate")
        plan = plan_at(host, classifier, labels, scale * safe[0])
        found += signs_of(host, rows, generate(host, rows, N_TOKENS, plan=plan))
    return found


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("classifier")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    classifier = store_of(args.model).classifier(args.classifier)
    loaded = load_model(args.model, device="cpu", dtype=args.dtype)
    profile = profile_model(loaded.model, model_id=loaded.id, tokenizer=loaded.tokenizer)
    host = SteeredModel(loaded, profile)
    answers = [answer_of(host.tokenizer, question, "") for question in questions()]
    prompts = [answer.ids[: answer.n_prompt] for answer in answers]
    asked, others = prompts[:N_QUESTIONS], prompts[N_QUESTIONS:]
    limits = Coherence.fit(host, others, n_tokens=N_TOKENS)
    print(limits, file=sys.stderr)
    unsteered = signs_of(host, asked, generate(host, asked, N_TOKENS))
    shares = {"unsteered": limits.share(unsteered)}
    print(f"{'unsteered':<12}{shares['unsteered']:8.1%}")
    for scale in SCALES:
        signs = answered(host, classifier, asked, scale)
        shares[str(scale)] = limits.share(signs)
        why = Counter(reason for one in signs for reason in limits.reasons(one))
        print(f"scale {scale:<6}{shares[str(scale)]:8.1%}   {dict(why)}", flush=True)
    if args.json:
        facts = {"classifier": classifier.card(), "n_questions": len(asked), "shares": shares}
        Path(args.json).write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()

"""A classifier's build: what its request is checked for, and its work."""

from __future__ import annotations

from functools import partial

from trimtab.attribution.slices import Slices
from trimtab.serving.artifact_files import classifier_card
from trimtab.serving.build_request import ClassifierBuildRequest
from trimtab.serving.build_run import check_may_store, host_of, refused_at
from trimtab.serving.builds import Built
from trimtab.serving.engines.base import ModelAccess
from trimtab.serving.errors import RequestError
from trimtab.serving.jobs import Progress, Work
from trimtab.serving.state import ServerState
from trimtab.steering.errors import DataError
from trimtab.training.classifiers.build import build_classifier, check_size, trained_layers
from trimtab.training.classifiers.doses import calibrate_doses
from trimtab.training.classifiers.examples import ExampleSet, tokens_of
from trimtab.training.classifiers.fit import Recipe
from trimtab.training.classifiers.own_answers import own_answers
from trimtab.training.classifiers.readers import bundled, labelled_texts
from trimtab.training.classifiers.states import Position, layers_at_once, tokens_read


def classifier_work(
    server: ServerState, access: ModelAccess, request: ClassifierBuildRequest
) -> Work[Built]:
    """Return the work that trains and stores a classifier.

    Raises:
        RequestError: the request cannot be trained as it is.
    """
    data = _examples(request)
    n_own = request.own_answer_tokens
    has_answers = n_own is not None or all(example.answer for example in data.examples)
    position: Position = request.position or ("answer" if has_answers else "last")
    with refused_at(_source(request)):
        needs_answers = position != "last" and n_own is None
        data.check(is_exclusive=request.is_exclusive, needs_answers=needs_answers)
        data.split(seed=request.seed)
    _check_size(access, request, n_labels=len(data.labels))
    _check_lengths(access, request, data, position)

    def work(slices: Slices, progress: Progress) -> Built:
        host = host_of(access, slices)
        examples = data
        if n_own is not None:
            answering = partial(progress, "answering")
            examples = own_answers(host, data, n_tokens=n_own, progress=answering)
        classifier = build_classifier(
            host,
            examples,
            id=request.id,
            layers=request.layers,
            kind=request.network,
            is_exclusive=request.is_exclusive,
            hidden=request.hidden,
            position=position,
            seed=request.seed,
            description=request.description,
            progress=progress,
        )
        problem = None
        if request.calibrate:
            try:
                classifier = calibrate_doses(host, classifier, progress=progress)
            except DataError as error:
                # Reading needs no doses: what was trained is kept, and the client is told.
                problem = RequestError(
                    f"{request.id} is trained and stored, but not calibrated: {error.message}",
                    param="calibrate",
                    code="not_calibrated",
                )
        check_may_store(server, request, progress)
        server.store.put_classifier(classifier)
        return Built(classifier_card(server.store.classifier(request.id)), problem)

    return work


def _source(request: ClassifierBuildRequest) -> str:
    return "texts" if request.texts is not None else "bundled"


def _examples(request: ClassifierBuildRequest) -> ExampleSet:
    with refused_at(_source(request)):
        if request.bundled is not None:
            return bundled(request.bundled)
        assert request.texts is not None  # the only source left
        rows = ((f"texts[{i}]", row) for i, row in enumerate(request.texts))
        return labelled_texts(rows, name="texts")


def _check_size(access: ModelAccess, request: ClassifierBuildRequest, *, n_labels: int) -> None:
    profile = access.subject.profile
    with refused_at("layers"):
        layers = trained_layers(request.layers, len(profile.layers))
    with refused_at("hidden"):
        recipe = Recipe(kind=request.network, hidden=request.hidden)
        d = profile.ref.hidden_size
        check_size(recipe, d, n_labels=n_labels, n_layers=len(layers))


def _check_lengths(
    access: ModelAccess, request: ClassifierBuildRequest, data: ExampleSet, position: Position
) -> None:
    """Refuse texts too long for the model, or too many for memory."""
    profile, n_own = access.subject.profile, request.own_answer_tokens
    longest, n_rows = profile.max_context - (n_own or 0), 0
    if longest < 1:
        raise RequestError(
            f"own_answer_tokens is {n_own}; the model attends to {profile.max_context}.",
            param="own_answer_tokens",
        )
    for i, example in enumerate(data.examples):
        where = f"texts[{i}]" if request.texts is not None else "bundled"
        with refused_at(where if n_own is None else "own_answer_tokens"):
            answer = tokens_of(access.loaded.tokenizer, example, max_context=longest)
            n_rows += 1 if n_own is not None else len(tokens_read(answer, position))
    with refused_at(_source(request)):
        layers_at_once(n_rows, 1, profile.ref.hidden_size)

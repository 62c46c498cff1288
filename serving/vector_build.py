"""A vector's build: what its request is checked for, and its work."""

from __future__ import annotations

from functools import partial
from typing import Any

from trimtab.attribution.attribute import default_method
from trimtab.attribution.methods.registry import name_of
from trimtab.attribution.slices import Slices
from trimtab.serving.artifact_files import vector_card
from trimtab.serving.build_request import VectorBuildRequest
from trimtab.serving.build_run import check_may_store, host_of, refused_at
from trimtab.serving.builds import Built
from trimtab.serving.engines.base import ModelAccess
from trimtab.serving.errors import RequestError
from trimtab.serving.jobs import Progress, Work
from trimtab.serving.state import ServerState
from trimtab.training.vectors import registry
from trimtab.training.vectors.activations import Position, parse_position, tokens_at
from trimtab.training.vectors.build import answers_to, build_vector, check_pairs
from trimtab.training.vectors.descriptions import check_descriptions, pairs_from_descriptions
from trimtab.training.vectors.grains import AUTO, Grains
from trimtab.training.vectors.pairs import PairSet, concept, pair_set

MAX_STATE_BYTES = 2 * 2**30


def vector_work(
    server: ServerState, access: ModelAccess, request: VectorBuildRequest
) -> Work[Built]:
    """Return the work that builds and stores a vector.

    Raises:
        RequestError: the request cannot be built as it is.
    """
    method = request.method or registry.DEFAULT
    fitter, options = _method(server, access, method, request.params)
    with refused_at("position"):
        position = parse_position(str(request.position))
    pairs = _pairs(request)
    if pairs is None:
        assert request.describe is not None  # the only source left
        assert request.against is not None
        with refused_at("describe"):
            check_descriptions(access.loaded.tokenizer, request.describe, request.against)
    else:
        with refused_at(_source(request)):
            check_pairs(pairs, fitter)
        _check_lengths(access, request, pairs, position)

    def work(slices: Slices, progress: Progress) -> Built:
        host = host_of(access, slices)
        data = pairs
        if data is None:
            assert request.describe is not None
            assert request.against is not None
            data = pairs_from_descriptions(
                host,
                request.describe,
                request.against,
                progress=partial(progress, "writing the pairs"),
            )
        vector = build_vector(
            host,
            data,
            id=request.id,
            method=method,
            options=options,
            position=position,
            normalize=request.normalize,
            is_calibrated=request.calibrate,
            is_mapped=request.map,
            description=request.description,
            progress=progress,
        )
        check_may_store(server, request, progress)
        server.store.put_vector(vector)
        return Built(vector_card(server.store.vector(request.id)))

    return work


def _method(
    server: ServerState, access: ModelAccess, name: str, params: dict[str, Any]
) -> tuple[registry.Method, dict[str, Any]]:
    with refused_at("params"):
        fitter = registry.make(name, params)
    if isinstance(fitter, Grains) and not server.settings.attnlrp:
        if name_of(fitter.attribution) == "attnlrp":
            raise RequestError(
                "This server does not offer AttnLRP; use 'kernel_shap'.",
                param="params.attribution",
            )
        if fitter.attribution == AUTO:
            params = {**params, "attribution": default_method(access.subject, attnlrp=False)}
    return fitter, params


def _source(request: VectorBuildRequest) -> str:
    return "pairs" if request.pairs is not None else "concept"


def _pairs(request: VectorBuildRequest) -> PairSet | None:
    """Return the pairs that are written down, or None if the model has to write them."""
    with refused_at(_source(request)):
        if request.concept is not None:
            return concept(request.concept)
        if request.pairs is None:
            return None
        rows = ((f"pairs[{i}]", row) for i, row in enumerate(request.pairs))
        return pair_set(rows, name="pairs")


def _check_lengths(
    access: ModelAccess, request: VectorBuildRequest, pairs: PairSet, position: Position
) -> None:
    """Refuse pairs too long for the model, too short for the position, or too many for memory."""
    profile = access.subject.profile
    for i, pair in enumerate(pairs.pairs):
        if pair.is_held:
            continue
        where = f"pairs[{i}]" if request.pairs is not None else "concept"
        with refused_at(where):
            answers = answers_to(access.loaded.tokenizer, pair, max_context=profile.max_context)
        with refused_at("position"):
            for answer in answers:
                tokens_at(answer, position)
    n_bytes = 8 * len(pairs.build) * len(profile.layers) * profile.ref.hidden_size
    if n_bytes > MAX_STATE_BYTES:
        raise RequestError(
            f"The hidden states of {len(pairs.build)} pairs at {len(profile.layers)} layers take "
            f"{n_bytes} bytes, over {MAX_STATE_BYTES}; give fewer pairs.",
            param=_source(request),
            status=413,
            code="build_too_large",
        )

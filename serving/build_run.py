"""From a checked request to the work of a build: what vectors and classifiers share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trimtab.attribution.slices import Slices
from trimtab.serving.build_request import (
    BuildRequest,
    ClassifierBuildRequest,
    VectorBuildRequest,
)
from trimtab.serving.builds import Built
from trimtab.serving.engines.base import ModelAccess
from trimtab.serving.errors import RequestError
from trimtab.serving.jobs import Progress, Work
from trimtab.serving.state import ServerState
from trimtab.steering.errors import TrimtabError
from trimtab.training.steered_model import SteeredModel


def build_access(server: ServerState) -> ModelAccess:
    """Return the model in process.

    Raises:
        RequestError: 501, the engine has it elsewhere.
        NotReadyError: it is not loaded.
    """
    _ = server.info
    access = server.engine.model_access
    if access is None:
        raise RequestError(
            "This server's engine has the model in other processes and cannot build with it. "
            "Build with `trimtab vectors build` or `trimtab classifiers train`: what they store "
            "is served here at once. Or serve the model with --engine transformers.",
            status=501,
            code="builds_unavailable",
        )
    return access


def build_work(
    server: ServerState, access: ModelAccess, request: VectorBuildRequest | ClassifierBuildRequest
) -> Work[Built]:
    """Return a build's work, once all that can be refused has been refused.

    Raises:
        RequestError: the field at fault in `param`; 409 if the id is taken.
    """
    check_is_free(server, request)
    # Here and not above: methods bring their libraries, which serving does not need.
    if isinstance(request, VectorBuildRequest):
        from trimtab.serving.vector_build import vector_work

        return vector_work(server, access, request)
    from trimtab.serving.classifier_build import classifier_work

    return classifier_work(server, access, request)


def check_is_free(server: ServerState, request: BuildRequest) -> None:
    """Refuse an id that is taken, unless it may be replaced.

    Raises:
        RequestError: 409, it is.
    """
    is_vector = isinstance(request, VectorBuildRequest)
    store, word = server.store, "vector" if is_vector else "classifier"
    has = store.has_vector if is_vector else store.has_classifier
    if has(request.id) and not request.overwrite:
        raise RequestError(
            f"There is a {word} {request.id!r} already; choose another id, or send overwrite true "
            "to replace it.",
            param="id",
            status=409,
            code="already_exists",
        )


def check_may_store(server: ServerState, request: BuildRequest, progress: Progress) -> None:
    """Look once more, when an artifact is ready, whether it may be stored.

    Raises:
        CancelledError: the build was called off.
        RequestError: 409, an artifact of that id has come meanwhile.
    """
    progress("storing", 0, 1)
    check_is_free(server, request)


def host_of(access: ModelAccess, slices: Slices) -> SteeredModel:
    """Return the served model for one build, with a bank of its own."""
    return SteeredModel(
        access.loaded, access.subject.profile, slices=slices, subject=access.subject
    )


@contextmanager
def refused_at(param: str) -> Iterator[None]:
    """Give an error inside the block the field at fault, if it names none itself.

    Raises:
        RequestError: 400 even for an unknown name: the route is there, the field is at fault.
    """
    try:
        yield
    except TrimtabError as error:
        raise RequestError(
            error.message, param=error.param or param, code="invalid_build"
        ) from None

"""What the routes of vectors and of classifiers share: ids, files up, files down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Protocol, Self, TypeVar

from fastapi import Depends
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from trimtab.serving.body import read_body
from trimtab.serving.errors import RequestError
from trimtab.serving.state import ServerState
from trimtab.steering.artifact import ModelRef
from trimtab.steering.classifier import ClassifierArtifact
from trimtab.steering.errors import ArtifactError
from trimtab.steering.lookup import check_belongs, listed_layers
from trimtab.steering.store import Store, check_id
from trimtab.steering.vector import VectorArtifact

FILE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


class Artifact(Protocol):
    """What a vector and a classifier have in common."""

    @property
    def model(self) -> ModelRef:
        """The model it belongs to."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Its layers, ascending."""

    def renamed(self, new_id: str) -> Self:
        """Return the same under another id."""


A = TypeVar("A", bound=Artifact)

VECTOR = "steering.vector"
CLASSIFIER = "steering.classifier"


def vector_card(vector: VectorArtifact) -> dict[str, Any]:
    """Return a vector as it goes over the wire."""
    return {"object": VECTOR, **vector.card()}


def classifier_card(classifier: ClassifierArtifact) -> dict[str, Any]:
    """Return a classifier as it goes over the wire."""
    return {"object": CLASSIFIER, **classifier.card()}


def artifact_id(name: str) -> str:
    """Path parameter: an id that cannot be mistaken for a path.

    Raises:
        ArtifactError: it could.
    """
    return check_id(name, param="id")


ArtifactId = Annotated[str, Depends(artifact_id)]


async def uploaded(
    http: HttpRequest,
    server: ServerState,
    *,
    name: str,
    what: str,
    read: Callable[[bytes, str], A],
    put: Callable[[A], bool],
) -> tuple[A, bool]:
    """Store the artifact in a request's body under the path's id, whatever the file says.

    Args:
        http: its body is the file.
        server: the app's parts.
        name: the id.
        what: `vector` or `classifier`.
        read: makes it of the file's bytes and a name for errors.
        put: stores it; returns whether its id was new.

    Returns:
        What was stored, and whether its id was new.

    Raises:
        RequestError: 413, the file is too long.
        TrimtabError: it cannot be read, or is not the served model's.
    """
    info = server.info  # nothing to check it against while the model loads
    data = await read_body(http, limit=server.settings.max_upload_bytes)

    def store() -> tuple[A, bool]:
        try:
            artifact = read(data, name).renamed(name)
        except ArtifactError as error:
            error.param = error.param or "body"
            raise
        check_belongs(artifact.model, info.model, name=name, param="body", what=what)
        n_layers = len(info.hidden_norms)
        if artifact.layers[-1] >= n_layers:
            raise ArtifactError(
                f"{what.capitalize()} {name!r} has {listed_layers(artifact.layers)}; the model has "
                f"layers 0 to {n_layers - 1}.",
                param="body",
            )
        return artifact, put(artifact)

    return await run_in_threadpool(store)


def check_format(http: HttpRequest, given: str, *, known: tuple[str, ...]) -> None:
    """Refuse a download's query that asks for what there is not.

    Raises:
        RequestError: an unknown format, or a parameter other than `format`.
    """
    unknown = sorted(set(http.query_params) - {"format"})
    if unknown or given not in known:
        raise RequestError(
            f"The download takes `format`, which is {' or '.join(map(repr, known))}.",
            param=unknown[0][:80] if unknown else "format",
        )


def download(data: bytes, *, file: str, digest: str) -> Response:
    """Return an artifact's file as something a browser saves."""
    headers = {"content-disposition": f'attachment; filename="{file}"', "etag": f'"{digest}"'}
    return Response(data, media_type="application/octet-stream", headers=headers)


def problems_in(store: Store, folder: str) -> dict[str, str]:
    """Return what is wrong with the files of one kind, by file name."""
    mine = f"{folder}/"
    found = store.problems.items()
    return {path.removeprefix(mine): why for path, why in found if path.startswith(mine)}

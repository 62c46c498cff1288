"""Artifacts as files, whatever their kind: what `vectors` and `classifiers` do alike."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.steering.errors import ArtifactError, NotFoundError
from trimtab.steering.model.default import DEFAULT_MODEL_ID
from trimtab.ui.stores import all_stores, model_id, store_of
from trimtab.ui.terminal import ask_to_confirm, next_steps, say, styled

if TYPE_CHECKING:
    from trimtab.steering.classifier import ClassifierArtifact
    from trimtab.steering.store import Store
    from trimtab.steering.vector import VectorArtifact

    Artifact = VectorArtifact | ClassifierArtifact


@dataclass(frozen=True)
class Kind:
    """A kind of artifact, as people and the store call it.

    Attributes:
        word: one of them.
        group: several: the command group and the store's folder.
    """

    word: str
    group: str

    def of(self, store: Store, artifact_id: str) -> Any:
        """Return one of a store's by id."""
        return getattr(store, self.word)(artifact_id)

    def put(self, store: Store, artifact: Artifact) -> None:
        """Store one."""
        getattr(store, f"put_{self.word}")(artifact)

    def delete(self, store: Store, artifact_id: str) -> None:
        """Remove one from a store."""
        getattr(store, f"delete_{self.word}")(artifact_id)

    def is_damaged(self, store: Store, artifact_id: str) -> bool:
        """Return whether its file is there and cannot be read."""
        return f"{self.group}/{artifact_id}.safetensors" in store.problems

    def found(self, model: str | None) -> tuple[list[Any], dict[str, str]]:
        """Return all of a model's, or of every model's, and file -> what is wrong with it."""
        stores = [store_of(model)] if model else all_stores()
        problems = {
            str(store.folder / file): problem
            for store in stores
            for file, problem in store.problems.items()
            if file.startswith(f"{self.group}/")
        }
        return [one for store in stores for one in getattr(store, self.group)()], problems


VECTOR = Kind("vector", "vectors")
CLASSIFIER = Kind("classifier", "classifiers")


def model_flag(model: str) -> str:
    """Return ` --model MODEL` for a next command, nothing for the default model."""
    return "" if model == DEFAULT_MODEL_ID else f" --model {shlex.quote(model)}"


def say_problems(problems: dict[str, str]) -> None:
    """Name the files that cannot be read, each with the command that removes it."""
    for file, problem in problems.items():
        say(f"{styled('Not read:', 'red')} {problem} Remove it: rm {shlex.quote(file)}")


def check_is_free(kind: Kind, store: Store, artifact_id: str, *, overwrite: bool) -> None:
    """Refuse an id that is taken, unless it may be replaced.

    Raises:
        ArtifactError: it is taken, or is no valid id.
    """
    from trimtab.steering.store import check_id

    check_id(artifact_id)
    if overwrite:
        return
    try:
        kind.of(store, artifact_id)
    except NotFoundError:
        if not kind.is_damaged(store, artifact_id):
            return
    raise ArtifactError(
        f"There is a {kind.word} {artifact_id!r} already; replace it with --overwrite, or choose "
        "another --id."
    )


def read_file(kind: Kind, file: Path) -> bytes:
    """Return a file's bytes, never more than an artifact may have.

    Raises:
        ArtifactError: there is none, or it is too large.
    """
    from trimtab.steering.artifact import MAX_ARTIFACT_BYTES

    if not file.is_file():
        raise ArtifactError(f"There is no file {str(file)!r}.")
    with file.open("rb") as opened:
        data = opened.read(MAX_ARTIFACT_BYTES + 1)
    if len(data) > MAX_ARTIFACT_BYTES:
        raise ArtifactError(f"{file.name} is over {MAX_ARTIFACT_BYTES} bytes; no {kind.word} is.")
    return data


def keep(
    kind: Kind,
    artifact: Artifact,
    *,
    name: str,
    artifact_id: str | None,
    model: str | None,
    overwrite: bool,
) -> None:
    """Store an artifact that came from elsewhere; say where, and what to try next.

    Args:
        kind: what it is.
        artifact: as its file has it.
        name: what to call the file in errors.
        artifact_id: id here; None takes the file's own.
        model: model to keep it for; None takes the one it names, or the default model.
        overwrite: replace one of the same id.

    Raises:
        ArtifactError: the id is taken or not valid, or it was built for another model.
    """
    from trimtab.steering.store import check_id

    # The id in a file is foreign text: it must not name a place outside the store.
    artifact = artifact.renamed(check_id(artifact_id or artifact.id))
    named = artifact.model.id if artifact.model.fingerprint is not None else ""
    kept_for = model or named or DEFAULT_MODEL_ID
    if model and named and model_id(model) != named:
        raise ArtifactError(
            f"{name} was built for {named!r}, not for {model_id(model)!r}, and would be refused "
            f"there. Leave --model out to keep it for {named!r}."
        )
    store = store_of(kept_for)
    check_is_free(kind, store, artifact.id, overwrite=overwrite)
    kind.put(store, artifact)
    say(f"Stored {artifact.id} for {model_id(kept_for)}: {len(artifact.layers)} layers.")
    next_steps(f"trimtab {kind.group} show {artifact.id}{model_flag(kept_for)}")


def delete_artifact(kind: Kind, artifact_id: str, *, model: str, yes: bool) -> None:
    """Delete an artifact, or its file if that cannot be read, once it is confirmed.

    Raises:
        NotFoundError: unknown id.
    """
    from trimtab.steering.store import check_id

    check_id(artifact_id)
    store = store_of(model)
    if not kind.is_damaged(store, artifact_id):
        kind.of(store, artifact_id)
    ask_to_confirm(f"Delete the {kind.word} {artifact_id!r} of {model_id(model)}?", yes=yes)
    kind.delete(store, artifact_id)
    say(f"Deleted {artifact_id}.")
    next_steps(f"trimtab {kind.group} list")

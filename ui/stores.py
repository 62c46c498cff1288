"""Find the store of a model without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.steering.model.paths import data_home

if TYPE_CHECKING:
    from trimtab.steering.spec import AblateTerm, SteeringSpec, VectorTerm
    from trimtab.steering.store import Store


def model_id(model: str) -> str:
    """Return the name a model is served under: a folder's own name, else what was given."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def store_of(model: str) -> Store:
    """Return the store of a model's vectors and presets.

    Args:
        model: a folder, a Hugging Face id or the default model's name.
    """
    from trimtab.steering.store import Store, model_folder

    return Store(model_folder(data_home(), model_id(model)))


def all_stores() -> list[Store]:
    """Return every store there is, by folder name."""
    from trimtab.steering.store import Store

    folders = sorted(path for path in (data_home() / "models").glob("*") if path.is_dir())
    return [Store(folder) for folder in folders]


def check_vectors(store: Store, spec: SteeringSpec) -> None:
    """Look up every vector that a spec names, so that a mistyped one is known at once.

    Raises:
        NotFoundError: there is none of that id.
    """
    terms: list[VectorTerm | AblateTerm] = [*spec.vectors, *spec.ablate]
    gates = [when for when in (spec.when, *(term.when for term in terms)) if when is not None]
    for name in [*(term.id for term in terms), *(gate.probe for gate in gates)]:
        store.vector(name)

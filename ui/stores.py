"""Find the store of a model without loading the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.steering.model.paths import data_home, model_id, store_id

if TYPE_CHECKING:
    from trimtab.steering.spec import AblateTerm, SteeringSpec, VectorTerm
    from trimtab.steering.store import Store

__all__ = ["all_stores", "check_names", "model_id", "store_of"]


def store_of(model: str) -> Store:
    """Return the store of a model's vectors, classifiers and presets.

    Args:
        model: a folder, a Hugging Face id or the default model's name.
    """
    from trimtab.steering.store import Store, model_folder

    return Store(model_folder(data_home(), store_id(model)))


def all_stores() -> list[Store]:
    """Return every store there is, by folder name."""
    from trimtab.steering.store import Store

    folders = sorted(path for path in (data_home() / "models").glob("*") if path.is_dir())
    return [Store(folder) for folder in folders]


def check_names(store: Store, spec: SteeringSpec) -> None:
    """Look up everything that a spec names, so that a mistyped id is known at once.

    Raises:
        NotFoundError: there is none of that id.
    """
    terms: list[VectorTerm | AblateTerm] = [*spec.vectors, *spec.ablate]
    gated = [spec.when, *(term.when for term in (*terms, *spec.guidance))]
    probes = [when.probe.partition("/") for when in gated if when is not None]
    for name in [*(term.id for term in terms), *(name for name, _, label in probes if not label)]:
        store.vector(name)
    followed = [term.classifier for term in spec.guidance]
    for name in [*followed, *(name for name, _, label in probes if label)]:
        store.classifier(name)

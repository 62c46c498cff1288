"""What a request names, looked up for one model: vectors, classifiers, layers, probes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from trimtab.kernels import Classifier
from trimtab.steering.artifact import ModelRef
from trimtab.steering.classifier import ClassifierArtifact
from trimtab.steering.errors import NotFoundError, SpecError, did_you_mean
from trimtab.steering.plan import Gate, Reader
from trimtab.steering.spec import When
from trimtab.steering.vector import VectorArtifact


class ArtifactSource(Protocol):
    """Where ids are looked up; `Store` is one."""

    def vector(self, name: str, *, param: str | None = None) -> VectorArtifact:
        """Return a vector by id or raise NotFoundError."""
        ...

    def classifier(self, name: str, *, param: str | None = None) -> ClassifierArtifact:
        """Return a classifier by id or raise NotFoundError."""
        ...


@dataclass(frozen=True)
class Lookup:
    """Finds artifacts for one model and refuses those that do not belong to it.

    Attributes:
        source: where ids are looked up.
        model: the served model.
        n_layers: its decoder layers.
    """

    source: ArtifactSource
    model: ModelRef
    n_layers: int

    def vector(self, name: str, *, param: str) -> VectorArtifact:
        """Return a vector of this model.

        Raises:
            NotFoundError: unknown id.
            SpecError: another model's.
        """
        vector = self.source.vector(name, param=param)
        check_belongs(vector.model, self.model, name=name, param=param)
        return vector

    def classifier(self, name: str, *, param: str) -> ClassifierArtifact:
        """Return a classifier of this model.

        Raises:
            NotFoundError: unknown id.
            SpecError: another model's.
        """
        found = self.source.classifier(name, param=param)
        check_belongs(found.model, self.model, name=name, param=param, what="classifier")
        return found

    def layers(
        self,
        asked: list[int] | None,
        artifact: VectorArtifact | ClassifierArtifact,
        default: tuple[int, ...],
        *,
        path: str,
    ) -> tuple[int, ...]:
        """Return the layers a term acts on, ascending.

        Args:
            asked: those the request names; None takes `default`.
            artifact: what acts there.
            default: the artifact's own choice.
            path: JSON path of the term.

        Raises:
            SpecError: a layer the model or the artifact does not have, or one named twice.
        """
        n, name = self.n_layers, artifact.id
        if asked is None:
            # A GGUF file does not say how many layers its model had.
            if default[-1] >= n:
                raise SpecError(
                    f"{path}: vector {name!r} has a direction for layer {default[-1]}; the "
                    f"model has layers 0 to {n - 1}. Name the layers to use in `layers`.",
                    param=f"{path}.layers",
                )
            return default
        has = "direction" if isinstance(artifact, VectorArtifact) else "network"
        for i, layer in enumerate(asked):
            if not 0 <= layer < n:
                raise SpecError(
                    f"{path}.layers[{i}] is {layer}; the model has layers 0 to {n - 1}.",
                    param=f"{path}.layers[{i}]",
                )
            if layer not in artifact.layers:
                raise SpecError(
                    f"{path}.layers[{i}] is {layer}, where {name!r} has no {has}; it has "
                    f"{', '.join(map(str, artifact.layers))}.",
                    param=f"{path}.layers[{i}]",
                )
        if len(set(asked)) != len(asked):
            raise SpecError(f"{path}.layers names a layer twice.", param=f"{path}.layers")
        return tuple(sorted(asked))

    def gate(self, when: When, *, path: str) -> Gate:
        """Return the gate a `when` asks for.

        Raises:
            NotFoundError: unknown id.
            SpecError: no probe, label or layer of that name; another model's.
        """
        param = f"{path}.probe"
        name, _, label = when.probe.partition("/")
        if label:
            reader = self.classifier_reader(name, layer=when.layer, path=path, param=param)
            number = label_number(reader.labels, label, name=name, param=param)
        else:
            reader = self.vector_reader(name, layer=when.layer, path=path, param=param)
            number = 0
        threshold = when.above if when.above is not None else when.below
        assert threshold is not None  # the spec has exactly one
        return Gate(
            probe=when.probe,
            reader=reader,
            label=number,
            threshold=threshold,
            above=when.above is not None,
            per_prompt=when.per == "prompt",
        )

    def probe(self, name: str, *, path: str) -> Reader:
        """Return what reads a probe: the classifier of that name, else the vector.

        Raises:
            NotFoundError: there is neither.
            SpecError: the vector carries no probe, or it is another model's.
        """
        try:
            return self.classifier_reader(name, layer=None, path=path, param=path)
        except NotFoundError:
            pass
        try:
            return self.vector_reader(name, layer=None, path=path, param=path)
        except NotFoundError as error:
            raise NotFoundError(
                f"{path}: there is neither a classifier nor a vector {name!r}. "
                f"{error.message.split('.', 1)[1].strip()}",
                param=path,
            ) from None

    def classifier_reader(self, name: str, *, layer: int | None, path: str, param: str) -> Reader:
        """Return a classifier's network at a layer; None takes its best."""
        found = self.classifier(name, param=param)
        at = found.probe_layer if layer is None else layer
        if at not in found.layers:
            raise SpecError(
                f"{path}.layer is {at}; {name!r} has {listed_layers(found.layers)}.",
                param=f"{path}.layer",
            )
        return reader_at(found, at)

    def vector_reader(self, name: str, *, layer: int | None, path: str, param: str) -> Reader:
        """Return a vector's probe at a layer as a network; None takes its best layer."""
        vector = self.vector(name, param=param)
        if vector.probe is None or vector.probe_layer is None:
            raise SpecError(
                f"{param}: vector {name!r} carries no fitted probe (an imported vector has none); "
                "build it with `trimtab vectors build`.",
                param=param,
            )
        at = vector.probe_layer if layer is None else layer
        if at not in vector.layers:
            raise SpecError(
                f"{path}.layer is {at}; {name!r} has {listed_layers(vector.layers)}.",
                param=f"{path}.layer",
            )
        row = vector.row(at)
        if not row.any():
            raise SpecError(
                f"{path}.layer: {name!r} is zero at layer {at} and reads nothing there; "
                "choose another layer.",
                param=f"{path}.layer",
            )
        slope, intercept = vector.probe[vector.layers.index(at)]
        weights = (slope * row / row.norm()).unsqueeze(0)
        network = Classifier.of([(weights, intercept.reshape(1))], is_exclusive=False)
        return Reader(name, at, network, (name,), f"{vector.digest}@{at}")


def reader_at(classifier: ClassifierArtifact, layer: int) -> Reader:
    """Return a classifier's network at one of its layers."""
    return Reader(
        id=classifier.id,
        layer=layer,
        classifier=classifier.at(layer),
        labels=classifier.labels,
        digest=f"{classifier.digest}@{layer}",
    )


def label_number(labels: tuple[str, ...], label: str, *, name: str, param: str) -> int:
    """Return a label's place among a classifier's.

    Raises:
        SpecError: it has none of that name.
    """
    if label not in labels:
        raise SpecError(
            f"{param}: classifier {name!r} has no label {label!r}.{did_you_mean(label, labels)} "
            f"It has {', '.join(labels)}.",
            param=param,
        )
    return labels.index(label)


def check_belongs(
    own: ModelRef, served: ModelRef, *, name: str, param: str | None, what: str = "vector"
) -> None:
    """Refuse an artifact of another model.

    Args:
        own: the model it was built for.
        served: the model it would act on.
        name: its id.
        param: JSON path of the field that named it.
        what: `vector` or `classifier`.

    Raises:
        SpecError: width, layer count, architecture or fingerprint differ; the message says which.
    """
    named = f"{what.capitalize()} {name!r}"
    if own.hidden_size != served.hidden_size:
        raise SpecError(
            f"{named} has width {own.hidden_size}, the model {served.id!r} has "
            f"{served.hidden_size}: it was built for {own.id!r}.",
            param=param,
        )
    if own.fingerprint is not None and own.fingerprint != served.fingerprint:
        raise SpecError(
            f"{named} was built for another model, {own.id!r}; this is {served.id!r}. "
            "Build it again for this model.",
            param=param,
        )
    if own.n_layers is not None and own.n_layers != served.n_layers:
        raise SpecError(
            f"{named} was built for a model of {own.n_layers} layers, {own.id!r}; "
            f"{served.id!r} has {served.n_layers}.",
            param=param,
        )
    if own.model_type != served.model_type:
        raise SpecError(
            f"{named} was built for a {own.model_type!r} model; {served.id!r} is a "
            f"{served.model_type!r}.",
            param=param,
        )


def listed_layers(layers: tuple[int, ...]) -> str:
    """Return layers for a message: "layers 0, 1, 2"."""
    return "layers " + ", ".join(map(str, layers))

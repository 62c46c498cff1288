"""What a folder says of its quantisation, under `trimtab_quantization` in config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trimtab.steering.errors import ModelLoadError

KEY = "trimtab_quantization"
STANDARD_KEY = "quantization_config"
FORMAT = 1

Activations = Literal["same", "fp8"]
ACTIVATIONS = ("same", "fp8")


@dataclass(frozen=True)
class QuantizationFacts:
    """How a model was quantised; what the layout itself cannot say.

    Attributes:
        scheme: the name it goes by, such as `nvfp4`, `w4a8` or `int4`.
        activations: `same` as the model's, or `fp8`: each token's rounded to FP8 E4M3 before each
            quantised matrix.
        method: how scales and codes were chosen, such as `gptq`; None where others made it.
        lorc_rank: rank of the low-rank correction; 0 means none.
        trimtab_version: which wrote it; None where others made it.
        source: id and digest of the model it was made from.
        report: what was measured when it was made, free of form.
    """

    scheme: str
    activations: Activations = "same"
    method: str | None = None
    lorc_rank: int = 0
    trimtab_version: str | None = None
    source: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name in a word or three, such as `w4a8 gptq lorc16`: what artifacts record."""
        words = [self.scheme, self.method, f"lorc{self.lorc_rank}" if self.lorc_rank else None]
        return " ".join(word for word in words if word)

    def to_json(self, *, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return the value of the key.

        Args:
            files: size and hash of every file of weights, by name.
        """
        return {"format": FORMAT, **asdict(self), "files": files}


def facts_from_json(value: Any, *, where: str) -> QuantizationFacts:
    """Return the facts of a folder's key.

    Raises:
        ModelLoadError: another version's, or not what we write.
    """
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        seen = value.get("format") if isinstance(value, dict) else value
        raise ModelLoadError(
            f"{where} was quantised in format {seen!r}; this trimtab reads {FORMAT}. "
            "Quantise it again with `trimtab quantize`."
        )
    known = {key: value[key] for key in QuantizationFacts.__dataclass_fields__ if key in value}
    facts = QuantizationFacts(**{"scheme": "", **known})
    if (
        not isinstance(facts.scheme, str)
        or not facts.scheme
        or facts.activations not in ACTIVATIONS
    ):
        raise ModelLoadError(
            f"{where} has an unreadable {KEY!r} in its config.json: scheme {facts.scheme!r}, "
            f"activations {facts.activations!r}. Quantise it again with `trimtab quantize`."
        )
    return facts

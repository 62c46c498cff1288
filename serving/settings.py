"""What an operator may set on the server: names, keys, limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MiB = 2**20

Key = Annotated[str, Field(min_length=8, max_length=512)]


class ServerSettings(BaseModel):
    """Settings of the HTTP app; the CLI's flags are made from these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    served_model_name: str | None = Field(
        None, min_length=1, description="Name of the model on the wire; null takes the model's id"
    )
    # Out of the repr, so that no log of the settings holds a key.
    api_keys: tuple[Key, ...] = Field((), repr=False, description="Bearer keys that may use /v1")
    admin_keys: tuple[Key, ...] = Field(
        (),
        repr=False,
        description="Bearer keys that may also change vectors, classifiers and presets",
    )
    max_dose: float | None = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="Largest relative dose |change| / |h| at a layer; null allows any",
    )
    max_body_bytes: int = Field(8 * MiB, ge=1024, description="Largest JSON body, bytes")
    max_upload_bytes: int = Field(64 * MiB, ge=1024, description="Largest uploaded file, bytes")
    max_prompts: int = Field(64, ge=1, description="Most prompts in one completions request")
    max_messages: int = Field(4096, ge=1, description="Most messages in one chat request")
    max_n: int = Field(16, ge=1, description="Most choices for one prompt")
    max_stop: int = Field(16, ge=1, description="Most stop strings")
    request_timeout_s: float = Field(
        600.0, gt=0, allow_inf_nan=False, description="Longest a request may take, queue included"
    )

    log_generations: Path | None = Field(
        None,
        description="Append prompts and answers to this file, a JSON line a choice, to train "
        "classifiers on; it then holds what people write",
    )
    log_generations_max_bytes: int = Field(
        1024 * MiB, ge=1024, description="Size at which that file is added to no more, bytes"
    )

    attribution_max_queue: int = Field(
        64, ge=1, description="Most attributions that may wait or run"
    )
    attribution_max_tokens: int = Field(
        250_000,
        ge=1,
        description="Most work of one attribution: rows times tokens, a gradient as two more rows",
    )
    attnlrp: bool = Field(
        True,
        description="Offer AttnLRP, whose authors state a patent and free use for personal and "
        "scientific purposes; without it kernel_shap is the default",
    )

    build_max_queue: int = Field(
        4, ge=1, description="Most builds of vectors and classifiers that may wait or run"
    )
    build_max_rows: int = Field(2000, ge=4, description="Most pairs or labelled texts of one build")
    build_max_chars: int = Field(
        2_000_000, ge=1, description="Most characters of one build's pairs or texts together"
    )

    @property
    def has_keys(self) -> bool:
        """True if the API is guarded."""
        return bool(self.api_keys or self.admin_keys)

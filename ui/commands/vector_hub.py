"""`trimtab vectors push` and `pull`: vectors on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from trimtab.steering.errors import ArtifactError, TrimtabError, listed
from trimtab.ui.commands.vector_files import store_vector
from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import model_option
from trimtab.ui.receipt_line import spans
from trimtab.ui.stores import store_of
from trimtab.ui.terminal import next_steps, say

SUFFIX = ".safetensors"


class HubError(TrimtabError):
    """The Hub could not be reached, or refused."""

    status = 502
    code = "hub_failed"


@click.command(
    "push",
    cls=HelpfulCommand,
    examples=("trimtab vectors push optimistic YOUR_NAME/smollm2-vectors",),
)
@click.argument("vector_id", metavar="ID")
@click.argument("repo")
@model_option
@click.option("--private", is_flag=True, help="Make the repository private if it is new.")
def push(vector_id: str, repo: str, model: str, private: bool) -> None:
    """Upload a vector to the Hub repository REPO (owner/name), with a model card.

    Needs a token that may write: `hf auth login` keeps one.
    """
    from huggingface_hub import HfApi

    from trimtab.steering.vector import to_bytes

    vector = store_of(model).vector(vector_id)
    with _hub_errors(repo):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        others = {file for file in api.list_repo_files(repo) if file.endswith(SUFFIX)}
        files = sorted(others | {vector_id + SUFFIX})
        say(f"Uploading {vector_id} to {repo} ...")
        for path, data in (
            (vector_id + SUFFIX, to_bytes(vector)),
            ("README.md", model_card(vector, repo=repo, files=files).encode()),
        ):
            api.upload_file(
                path_or_fileobj=data,
                path_in_repo=path,
                repo_id=repo,
                commit_message=f"trimtab: {vector_id}",
            )
    say(f"Pushed {vector_id} to https://huggingface.co/{repo}.")
    next_steps(f"trimtab vectors pull {repo} {vector_id}")


@click.command(
    "pull",
    cls=HelpfulCommand,
    examples=(
        "trimtab vectors pull YOUR_NAME/smollm2-vectors",
        "trimtab vectors pull YOUR_NAME/smollm2-vectors optimistic",
    ),
)
@click.argument("repo")
@click.argument("vector_id", metavar="[ID]", required=False)
@click.option("--revision", help="Branch, tag or commit.")
@click.option("--overwrite", is_flag=True, help="Replace a vector of the same id.")
def pull(repo: str, vector_id: str | None, revision: str | None, overwrite: bool) -> None:
    """Download a vector from the Hub, check it and store it.

    Without ID the repository must hold exactly one vector.
    """
    from huggingface_hub import HfApi, hf_hub_download

    from trimtab.steering.artifact import MAX_ARTIFACT_BYTES
    from trimtab.steering.store import check_id

    if vector_id is not None:
        check_id(vector_id)
    with _hub_errors(repo):
        files = HfApi().list_repo_files(repo, revision=revision)
        names = [f.removesuffix(SUFFIX) for f in files if f.endswith(SUFFIX) and "/" not in f]
        if vector_id is None and len(names) == 1:
            vector_id = check_id(names[0])
        if vector_id not in names:
            asked = "more than one vector" if vector_id is None and names else "no such vector"
            raise ArtifactError(
                f"{repo} holds {asked}; it has {listed(names)}. Name one: "
                f"trimtab vectors pull {repo} ID"
            )
        file = Path(hf_hub_download(repo, f"{vector_id}{SUFFIX}", revision=revision))
    if file.stat().st_size > MAX_ARTIFACT_BYTES:
        raise ArtifactError(f"{file.name} of {repo} is over {MAX_ARTIFACT_BYTES} bytes.")
    store_vector(
        file.read_bytes(),
        name=f"{repo}/{vector_id}{SUFFIX}",
        vector_id=vector_id,
        model=None,
        overwrite=overwrite,
    )


def model_card(vector: Any, *, repo: str, files: list[str]) -> str:
    """Return the repository's README for a vector, with the front matter the Hub reads."""
    base = vector.model.id
    # Only what looks like a Hub id may stand in `base_model`; the Hub refuses anything else.
    has_base = base.count("/") == 1 and not base.startswith((".", "/"))
    front = ["---", "library_name: trimtab", "tags:", "- steering-vector", "- trimtab"]
    front += [f"base_model: {base}"] if has_base else []
    description = vector.description or "A steering vector."
    others = [f"`{file.removesuffix(SUFFIX)}`" for file in files]
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# {vector.id}",
            "",
            description,
            "",
            f"A steering vector for `{base}` ({vector.model.model_type}, width "
            f"{vector.model.hidden_size}), built with the method `{vector.method}` by "
            f"trimtab {vector.trimtab_version}. By default "
            f"it acts at {spans(vector.default_layers)}; scale 1.0 is its calibrated unit.",
            "",
            "```bash",
            f"trimtab vectors pull {repo} {vector.id}",
            f'trimtab chat --steer "1.0 {vector.id}"',
            "```",
            "",
            f"This repository holds: {', '.join(others)}.",
            "",
        ]
    )


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn what the Hub's library raises into one sentence with a way out."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
    except TrimtabError:
        raise
    except HFValidationError:
        raise HubError(f"{repo!r} is no repository name; give owner/name.") from None
    except LocalTokenNotFoundError:
        raise HubError("The Hub wants to know you. Log in first: hf auth login") from None
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set: unset it to reach the Hub.") from None
    except RepositoryNotFoundError:
        raise HubError(
            f"The Hub has no repository {repo!r} that you may see. Check its name, or log in: "
            "hf auth login"
        ) from None
    except HfHubHTTPError as error:
        reason = " ".join(str(error).split())[:200]
        raise HubError(f"The Hub refused: {reason}. Log in if need be: hf auth login") from None
    except Exception as error:
        # The library lets its HTTP client's own errors through.
        is_network = type(error).__module__.split(".")[0] in ("httpx", "requests")
        if not is_network and not isinstance(error, OSError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise HubError(f"The Hub cannot be reached ({reason}). Check the network.") from error

"""Vectors to and from the Hugging Face Hub, with a hub of ours that keeps files in a folder."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from cli_program import vector
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

from trimtab.steering.vector import to_bytes

REPO = "someone/vectors"


class FakeHub:
    """The calls that push and pull make, on a folder."""

    folder: Path

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        (self.folder / repo).mkdir(parents=True, exist_ok=True)

    def list_repo_files(self, repo: str, *, revision: str | None = None) -> list[str]:
        if not (self.folder / repo).is_dir():
            raise RepositoryNotFoundError("404", response=_Answer())
        return sorted(path.name for path in (self.folder / repo).iterdir())

    def upload_file(
        self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str, commit_message: str
    ) -> None:
        (self.folder / repo_id / path_in_repo).write_bytes(path_or_fileobj)


class _Answer:
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None
    status_code = 404


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put the fake in the library's place; returns the repository's folder."""
    FakeHub.folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda repo, file, *, revision=None: str(FakeHub.folder / repo / file),
    )
    return FakeHub.folder / REPO


def test_push_then_pull(hub, trimtab, store):
    """Catches a vector that comes back from the Hub as another."""
    store.put_vector(vector(size=0.5))
    assert trimtab("vectors", "push", "warm", REPO).code == 0
    assert trimtab("vectors", "delete", "warm", "--yes").code == 0
    done = trimtab("vectors", "pull", REPO)
    assert done.code == 0, done.err
    assert store.vector("warm").digest == vector(size=0.5).digest
    assert torch.equal(store.vector("warm").row(1), torch.full((8,), 0.5))


def test_the_card_tells_what_it_is(hub, trimtab, store):
    """Catches a repository that says nothing, or forgets the vectors pushed before."""
    for name in ("warm", "cold"):
        store.put_vector(vector(name))
        assert trimtab("vectors", "push", name, REPO).code == 0
    card = (hub / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: trimtab\n")
    assert f"trimtab vectors pull {REPO} cold" in card
    assert "`cold`, `warm`" in card
    # The Hub refuses a base_model that is no repository.
    assert "base_model" not in card


def test_pull_asks_which(hub, trimtab, store):
    """Catches a pull that takes any one of several vectors."""
    hub.mkdir(parents=True)
    for name in ("warm", "cold"):
        (hub / f"{name}.safetensors").write_bytes(to_bytes(vector(name)))
    done = trimtab("vectors", "pull", REPO)
    assert done.code == 1
    assert "cold, warm" in done.err
    assert trimtab("vectors", "pull", REPO, "cold").code == 0
    assert trimtab("vectors", "pull", REPO, "cool").code == 1


@pytest.mark.parametrize("data", [b"\x80\x04pickle", to_bytes(vector())[:90], b""])
def test_what_is_pulled_is_checked(data, hub, trimtab, store):
    """Catches a file from the internet that is stored, or unpickled, unread."""
    hub.mkdir(parents=True)
    (hub / "warm.safetensors").write_bytes(data)
    assert trimtab("vectors", "pull", REPO).code == 1
    assert store.vectors() == []


@pytest.mark.parametrize("name", ["../evil", "..", "a b"])
def test_a_hostile_repository_names_no_path(name, hub, trimtab, store, tmp_path):
    """Catches a file name on the Hub, or an id, that leads out of the store."""
    assert trimtab("vectors", "pull", REPO, name).code == 1
    hub.mkdir(parents=True)
    file = hub / f"{name.replace('/', '-')}.safetensors"
    file.write_bytes(to_bytes(vector("../evil")))
    trimtab("vectors", "pull", REPO)
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (ConnectionError("no route"), "network"),
        (RepositoryNotFoundError("404", response=_Answer()), "hf auth login"),
    ],
)
def test_hub_trouble_is_a_sentence_with_a_way_out(error, word, hub, trimtab, monkeypatch):
    """Catches a network error that reaches the user as a traceback or as our own fault."""

    def fail(self, repo, *, revision=None):
        raise error

    monkeypatch.setattr(FakeHub, "list_repo_files", fail)
    done = trimtab("vectors", "pull", REPO)
    assert done.code == 1
    assert word in done.err
    assert "unexpectedly" not in done.err

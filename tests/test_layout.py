"""The tree is the architecture: what is packaged, who may import whom, how files are called."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Each folder, and the folders below it.
MAY_IMPORT = {
    "kernels": set(),
    "steering": {"kernels"},
    "attribution": {"kernels", "steering"},
    "training": {"kernels", "steering", "attribution"},
    "serving": {"kernels", "steering", "attribution", "training"},
    "ui": {"kernels", "steering", "attribution", "training", "serving"},
}
HTTP = {"fastapi", "starlette", "uvicorn", "openai", "httpx"}
NAMELESS = {"utils", "helpers", "common", "misc", "util", "helper"}
LAZY = re.compile(r"trimtab(\.\w+)+:\w+")


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def modules_named_in(path: Path) -> Iterator[str]:
    """Yield every module a file imports, relative ones resolved, and registry strings."""
    package = ["trimtab", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            yield ".".join([*above, *filter(None, [node.module])])
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from trimtab import ui` names the folder only in its second half.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and LAZY.fullmatch(str(node.value)):
            yield str(node.value)


def test_every_package_is_listed() -> None:
    """A sub-package missing from pyproject works in an editable install and not from a wheel."""
    tree = {
        ".".join(["trimtab", *path.relative_to(ROOT).parent.parts])
        for folder in MAY_IMPORT
        for path in sources(folder)
    }
    assert sorted(tree) == sorted(SETUP["tool"]["setuptools"]["packages"])


def test_every_package_has_an_init() -> None:
    """A folder without __init__.py becomes a namespace package that setuptools may drop."""
    bare = {
        path.parent.relative_to(ROOT)
        for folder in MAY_IMPORT
        for path in sources(folder)
        if not (path.parent / "__init__.py").is_file()
    }
    assert not bare


def test_package_dir_covers_the_code_folders() -> None:
    """A new code folder that is not mapped can't be imported."""
    mapping = SETUP["tool"]["setuptools"]["package-dir"]
    assert mapping == {f"trimtab.{folder}": folder for folder in MAY_IMPORT}


def test_package_data_patterns_match_files() -> None:
    """Concepts and prompts that no pattern matches are left out of the wheel."""
    for package, patterns in SETUP["tool"]["setuptools"]["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: {pattern} matches nothing"


def test_version_comes_from_the_install() -> None:
    """A version kept in two places goes out of step."""
    assert version("trimtab") == SETUP["project"]["version"]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_one_way(folder: str) -> None:
    """An upward import ties the floors into a knot (kernels that need the server, say)."""
    allowed = MAY_IMPORT[folder] | {folder}
    wrong = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in sources(folder)
        for module in modules_named_in(path)
        if module.startswith("trimtab.") and re.split(r"[.:]", module)[1] not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize("folder", ["kernels", "steering", "attribution", "training"])
def test_lower_floors_know_no_http(folder: str) -> None:
    """Steering that imports a web framework can't be used as a library."""
    wrong = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in sources(folder)
        for module in modules_named_in(path)
        if module.split(".")[0] in HTTP
    ]
    assert not wrong


def test_files_are_named_after_their_concept() -> None:
    """A utils.py grows into the room where everything is."""
    wrong = [p for folder in MAY_IMPORT for p in sources(folder) if p.stem in NAMELESS]
    assert not wrong


def is_reexport(node: ast.stmt) -> bool:
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    return is_docstring or is_all or isinstance(node, ast.Import | ast.ImportFrom)


def test_inits_only_reexport() -> None:
    """Code in an __init__ runs for whoever imports any neighbour."""
    for folder in MAY_IMPORT:
        for path in (ROOT / folder).rglob("__init__.py"):
            body = ast.parse(path.read_text()).body
            assert body, f"{path.relative_to(ROOT)} has no docstring"
            assert ast.get_docstring(ast.parse(path.read_text())), path
            assert all(map(is_reexport, body)), f"{path.relative_to(ROOT)} defines something"


def test_finding_the_default_model_does_not_import_torch() -> None:
    """An import of torch here adds seconds to `--help` and to every refusal."""
    check = "import sys, trimtab.steering.model.default; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", check], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr

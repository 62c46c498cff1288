"""What the vLLM engine depends on inside vLLM is there, in both ends of the supported range.

The sources are parsed, not imported, so a version that needs another torch can be checked too.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

import pytest

from trimtab.serving.engines.vllm.contract import HOOKS, Hook

# Where `make vllm` puts the sources of the oldest version we support.
OLDEST = Path(__file__).parents[2] / "build" / "vllm-0.26" / "vllm"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def installed() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def fault(hook: Hook, package: Path) -> str | None:
    """Return what vLLM lacks of a hook, or None if it has everything."""
    path = package / hook.file
    if not path.is_file():
        return f"{hook.file} is not there"
    way: list[ast.AST] = [parsed(path)]
    for part in hook.name.split("."):
        found = [child for child in ast.iter_child_nodes(way[-1]) if is_called(child, part)]
        if not found:
            return f"{hook.file} has no {hook.name}"
        way.append(found[-1])
    lacks = wrong_shape(hook, way[-1]) or lost_call(hook, way) or lost_method(hook, way[-1])
    return lacks and f"{hook.name} in {hook.file}: {lacks}"


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def is_called(node: ast.AST, name: str) -> bool:
    return isinstance(node, Function | ast.ClassDef) and node.name == name


def wrong_shape(hook: Hook, node: ast.AST) -> str | None:
    if isinstance(node, ast.ClassDef):
        leading, names = [], class_members(node)
    else:
        assert isinstance(node, Function)
        arguments = node.args
        leading = [arg.arg for arg in [*arguments.posonlyargs, *arguments.args]]
        leading = leading[1:] if leading[:1] == ["self"] else leading
        names = {arg.arg for arg in [*arguments.args, *arguments.kwonlyargs]}
    if tuple(leading[: len(hook.parameters)]) != hook.parameters:
        return f"begins with {leading}, not {list(hook.parameters)}"
    absent = [name for name in hook.named if name not in names]
    return f"has no {', '.join(absent)}" if absent else None


def class_members(node: ast.ClassDef) -> set[str]:
    """Return what a class body defines, and what its `__init__` sets on `self`."""
    inits = [line for line in node.body if is_called(line, "__init__")]
    on_self = {
        inner.attr
        for init in inits
        for inner in ast.walk(init)
        if isinstance(inner, ast.Attribute)
        and isinstance(inner.ctx, ast.Store)
        and ast.unparse(inner.value) == "self"
    }
    targets = [
        target
        for line in node.body
        if isinstance(line, ast.Assign | ast.AnnAssign)
        for target in (line.targets if isinstance(line, ast.Assign) else [line.target])
    ]
    fields = {target.id for target in targets if isinstance(target, ast.Name)}
    return on_self | fields | {line.name for line in node.body if isinstance(line, Function)}


def lost_call(hook: Hook, way: list[ast.AST]) -> str | None:
    """Return the call that is gone, or that a local name of the functions around it shadows."""
    called = {
        node.func.id
        for node in ast.walk(way[-1])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    local = {name for node in way[1:] for inner in ast.walk(node) for name in bound_by(inner)}
    lost = [name for name in hook.calls if name not in called - local]
    return f"does not call the global {', '.join(lost)}" if lost else None


def lost_method(hook: Hook, node: ast.AST) -> str | None:
    """Return the method that is not called any more, whatever it was called on."""
    called = {
        inner.func.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute)
    }
    lost = [name for name in hook.methods if name not in called]
    return f"does not call the method {', '.join(lost)}" if lost else None


def bound_by(node: ast.AST) -> list[str]:
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.alias):
        return [node.asname or node.name]
    return [node.name] if isinstance(node, Function | ast.ClassDef) else []


@pytest.mark.vllm
@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
@pytest.mark.parametrize("version", ["installed", "0.26"])
def test_vllm_has_the_hook(version: str, hook: Hook) -> None:
    """A renamed method or a swapped parameter in vLLM would steer nothing, or the wrong tokens."""
    if version == "0.26" and not OLDEST.is_dir():
        pytest.skip(f"vLLM 0.26's sources are not in {OLDEST.parent}; `make vllm` fetches them")
    assert fault(hook, installed() if version == "installed" else OLDEST) is None


SOURCE = """
class Runner:
    def __init__(self):
        self.batch = []

    def step(self, batch, *, is_dry: bool = False): ...

    def finish(self):
        self.batch.free()

class Output:
    tokens: list[int]
    reason: str | None = None

class Status(IntEnum):
    FAILED = 1

def extra_keys(request): ...

def make_hasher(size):
    def hasher(request):
        return extra_keys(request)
    return hasher

def make_private_hasher(size):
    from elsewhere import extra_keys
    def hasher(request):
        return extra_keys(request)
    return hasher
"""


@pytest.mark.parametrize(
    "hook",
    [
        Hook("made_up.py", "Runner.step", ("batch",), named=("is_dry",)),
        Hook("made_up.py", "Runner", named=("step", "batch")),
        Hook("made_up.py", "Output", named=("tokens", "reason")),
        Hook("made_up.py", "Status", named=("FAILED",)),
        Hook("made_up.py", "make_hasher.hasher", ("request",), calls=("extra_keys",)),
        Hook("made_up.py", "Runner.finish", methods=("free",)),
    ],
    ids=lambda hook: hook.name,
)
def test_a_hook_that_is_there_has_no_fault(hook: Hook, tmp_path: Path) -> None:
    """A check that finds fault with everything says nothing about a version."""
    (tmp_path / "made_up.py").write_text(SOURCE)
    assert fault(hook, tmp_path) is None


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (Hook("gone.py", "Runner"), "gone.py is not there"),
        (Hook("made_up.py", "Runner.stop"), "has no Runner.stop"),
        (Hook("made_up.py", "step"), "has no step"),
        (Hook("made_up.py", "Runner.step", ("plan",)), "begins with ['batch'], not ['plan']"),
        (Hook("made_up.py", "Runner.step", ("batch", "is_dry")), "begins with ['batch']"),
        (Hook("made_up.py", "Runner.step", named=("is_wet",)), "has no is_wet"),
        (Hook("made_up.py", "Runner", named=("batch", "is_dry")), "has no is_dry"),
        (Hook("made_up.py", "Output", named=("tokens", "text")), "has no text"),
        (Hook("made_up.py", "Status", named=("LOST",)), "has no LOST"),
        (
            Hook("made_up.py", "make_hasher.hasher", calls=("salt",)),
            "does not call the global salt",
        ),
        (
            Hook("made_up.py", "Runner.finish", methods=("release",)),
            "does not call the method release",
        ),
        (
            Hook("made_up.py", "make_private_hasher.hasher", calls=("extra_keys",)),
            "does not call the global extra_keys",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_made_up_hook_is_reported(hook: Hook, message: str, tmp_path: Path) -> None:
    """A check that cannot fail would pass every version of vLLM."""
    (tmp_path / "made_up.py").write_text(SOURCE)
    found = fault(hook, tmp_path)
    assert found is not None
    assert message in found

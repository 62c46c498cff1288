"""`trimtab doctor`: what is installed and chosen, what is broken, and what mends it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import click

from trimtab.ui.help_page import HelpfulCommand
from trimtab.ui.options import json_option
from trimtab.ui.terminal import next_steps, out, out_json, say, styled, width, wrapped

GIB = 2**30
PACKAGES = ("trimtab", "torch", "transformers", "safetensors", "fastapi", "huggingface_hub")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: `ok`, `note` (works, could be better) or `broken`.
        detail: what was found.
        mend: what to do about it, for `note` and `broken`.
    """

    name: str
    status: str
    detail: str
    mend: str = ""


@click.command(
    cls=HelpfulCommand,
    examples=(
        "trimtab doctor",
        "trimtab doctor --json",
    ),
)
@json_option
def doctor(as_json: bool) -> None:
    """Check the installation: versions, device, memory, caches, stores, and steering itself.

    Exits with 1 if something is broken, and says for everything found what mends it.
    """
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            found = list(check())
        # A check that cannot run is itself a finding; the others still tell something.
        except Exception as error:
            if os.environ.get("TRIMTAB_DEBUG"):
                raise
            name = check.__name__.strip("_").replace("_", " ")
            shown = f"{type(error).__name__}: {error}"[:300]
            found = [Finding(name, "broken", shown, "Install trimtab anew: pip install trimtab")]
        findings.extend(found)
        for finding in () if as_json else found:
            _print(finding)
    n_broken = sum(finding.status == "broken" for finding in findings)
    if as_json:
        out_json({"ok": not n_broken, "findings": [asdict(finding) for finding in findings]})
    elif n_broken:
        say(f"{n_broken} of {len(findings)} are broken; mend them as said above, then run:")
        next_steps("trimtab doctor")
    else:
        say("Nothing is broken.")
        next_steps("trimtab demo", "trimtab serve")
    if n_broken:
        click.get_current_context().exit(1)


def _print(finding: Finding) -> None:
    marks = {"ok": ("ok    ", "green"), "note": ("note  ", "yellow"), "broken": ("BROKEN", "red")}
    mark, colour = marks[finding.status]
    head = f"{styled(mark, colour)} {finding.name:<15} "
    lines = wrapped(finding.detail, indent=" " * 23).lstrip()
    out(head + (lines if len(finding.detail) + 23 > width() else finding.detail))
    if finding.mend:
        out(f"{'':<23}-> {finding.mend}")


# --- checks, each yields what it found


def _python() -> Iterator[Finding]:
    is_new = sys.version_info >= (3, 11)
    yield Finding(
        "python",
        "ok" if is_new else "broken",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "" if is_new else "trimtab needs Python 3.11 or newer.",
    )


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding(name, "broken", "not installed", f"pip install {name}")


def _device() -> Iterator[Finding]:
    import torch

    from trimtab.steering.model.precision import cpu_dtype

    # macOS has no affinity to ask for.
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        yield Finding("device", "ok", f"cuda: {torch.cuda.get_device_name()}")
    elif torch.backends.mps.is_available():
        yield Finding("device", "ok", "mps: Apple's GPU")
    else:
        yield Finding("device", "ok", "cpu: no GPU that torch can use was found")
        yield Finding("dtype", "ok", cpu_dtype()[1])
    fits = threads <= cores
    yield Finding(
        "threads",
        "ok" if fits else "note",
        f"torch uses {threads} on {cores} cores",
        "" if fits else f"More threads than cores wait for one another: OMP_NUM_THREADS={cores}",
    )


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    is_short = memory.available < 2 * GIB
    yield Finding(
        "memory",
        "note" if is_short else "ok",
        f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
        "The default model needs about 2 GiB with its cache; close something." if is_short else "",
    )


def _default_model() -> Iterator[Finding]:
    from trimtab.steering.model.default import DEFAULT_MODEL_ID, GGUF_SHA256
    from trimtab.steering.model.manifest import fault
    from trimtab.steering.model.paths import cache_home

    folder = cache_home() / "models" / DEFAULT_MODEL_ID
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    problem = fault(folder, source_sha256=GGUF_SHA256, verify=True)
    if problem is None:
        yield Finding("model cache", "ok", f"{DEFAULT_MODEL_ID} is whole in {folder}")
    elif not folder.exists():
        mend = "The first `trimtab demo` prepares it (about 25 s)."
        yield Finding("model cache", "note", f"{DEFAULT_MODEL_ID} is not in {folder} yet", mend)
    else:
        mend = "The next `trimtab demo` rebuilds it (about 25 s)."
        yield Finding("model cache", "note", f"{folder} is not whole: {problem}", mend)
    if not os.access(there, os.W_OK):
        mend = "Name another folder: TRIMTAB_CACHE=/path trimtab demo"
        yield Finding("model cache", "broken", f"{there} cannot be written", mend)
    elif problem and free < GIB:
        mend = "Free 0.7 GB, or name another disk: TRIMTAB_CACHE=/path trimtab demo"
        yield Finding("disk", "broken", f"{free / GIB:.1f} GiB free for {folder}", mend)


def _stores() -> Iterator[Finding]:
    from trimtab.steering.model.paths import data_home
    from trimtab.ui.stores import all_stores

    home = data_home()
    there = home
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK):
        mend = "Name another folder: TRIMTAB_HOME=/path trimtab vectors list"
        yield Finding("store", "broken", f"{there} cannot be written", mend)
    stores = all_stores()
    n_vectors = sum(len(store.vectors()) for store in stores)
    n_classifiers = sum(len(store.classifiers()) for store in stores)
    n_presets = sum(len(store.presets()) for store in stores)
    held = f"{n_vectors} vectors, {n_classifiers} classifiers and {n_presets} presets"
    yield Finding("store", "ok", f"{held} in {home}")
    for store in stores:
        for file, problem in store.problems.items():
            path = store.folder / file
            yield Finding(
                "store", "broken", f"{path}: {problem}", f"Build it again, or remove it: rm {path}"
            )


def _steering() -> Iterator[Finding]:
    from trimtab.ui.self_test import steering_problem

    began = time.perf_counter()
    problem = steering_problem()
    seconds = time.perf_counter() - began
    if problem is None:
        yield Finding("steering", "ok", f"a toy model was steered exactly, in {seconds:.1f} s")
    else:
        mend = "Install the versions in pyproject.toml; report it with `trimtab doctor --json`."
        yield Finding("steering", "broken", problem, mend)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _device,
    _memory,
    _default_model,
    _stores,
    _steering,
)

"""Which plan a request asks for: by its model name, its `steering` field or its xargs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from trimtab.serving.body import parse_json
from trimtab.serving.errors import RequestError
from trimtab.serving.state import ServerState
from trimtab.steering.compile import compile_plan
from trimtab.steering.errors import NotFoundError, SpecError, TrimtabError, did_you_mean
from trimtab.steering.lookup import Lookup
from trimtab.steering.plan import Plan, Reader
from trimtab.steering.spec import MAX_TERMS, TERM_KINDS, SteeringSpec, parse_spec

# Stands for the joined spec in error paths until they are mapped back; no client text holds it.
_JOINED = "\x00joined"
_JOINED_PATH = re.compile(_JOINED + rf"(?:\.({'|'.join(TERM_KINDS)})\[(\d+)\])?(\.when)?")


@dataclass(frozen=True)
class _Source:
    """A joined term's way back to what the client, or the preset's author, wrote."""

    root: str
    path: str
    has_when: bool


def request_plan(
    server: ServerState, *, model: str, steering: Any, xargs: dict[str, Any] | None = None
) -> Plan | None:
    """Return the compiled steering of a request, or None if it asks for none.

    A preset's terms come first, the request's own after them; each side's `when` gates its own.

    Args:
        server: the app's parts.
        model: the served name, or `<served>:<preset>`.
        steering: the request's `steering`, object or string.
        xargs: the request's `vllm_xargs`.

    Raises:
        RequestError: 404 for an unknown model or preset.
        TrimtabError: the spec is at fault; `param` is the path in the client's request.
    """
    preset_name = preset_of(server, model)
    own, path = _own_spec(steering, xargs)
    preset = None if preset_name is None else _preset(server, preset_name, model)
    if preset is None and own is None:
        return None
    if preset is None:
        assert own is not None  # just excluded
        return compile_spec(server, own, path=path)
    spec, sources = _joined(preset, own, name=f"preset {preset_name!r}", path=path)
    try:
        return compile_spec(server, spec, path=_JOINED)
    except TrimtabError as error:
        root = path if own is not None else f"preset {preset_name!r}"
        raise _mapped_back(error, sources, root=root) from None


def compile_spec(server: ServerState, spec: SteeringSpec, *, path: str) -> Plan:
    """Compile a spec for the served model under the server's limits.

    Raises:
        SpecError: see `compile_plan`.
    """
    info = server.info
    return compile_plan(
        spec,
        server.store,
        model=info.model,
        hidden_norms=info.hidden_norms,
        limits=server.limits,
        path=path,
    )


def probe_readers(server: ServerState, names: list[str]) -> tuple[Reader, ...]:
    """Return what reads a request's `probes`.

    Raises:
        NotFoundError: there is neither a classifier nor a vector of that name.
        SpecError: another model's, or a vector without a probe.
    """
    info = server.info
    lookup = Lookup(server.store, info.model, len(info.hidden_norms))
    return tuple(lookup.probe(name, path=f"probes[{i}]") for i, name in enumerate(names))


def read_spec(value: Any, *, path: str) -> SteeringSpec:
    """Read a spec like `parse_spec`, a JSON string as strictly as a request's body.

    Raises:
        TrimtabError: with `param` the JSON path of the first field at fault.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = parse_json(value, root=path)
    return parse_spec(value, path=path)


def preset_of(server: ServerState, model: str) -> str | None:
    """Return the preset that a model name carries, or None for the plain model.

    Raises:
        RequestError: 404 with OpenAI's code, naming the model that is served.
    """
    served = server.served_name
    if model == served:
        return None
    if model.startswith(f"{served}:"):
        return model.removeprefix(f"{served}:")
    raise RequestError(
        f"There is no model {model[:80]!r} here.{did_you_mean(model[:80], [served])} "
        f"This server serves {served!r} (and {served + ':<preset>'!r}).",
        param="model",
        status=404,
        code="model_not_found",
    )


def _preset(server: ServerState, name: str, model: str) -> SteeringSpec:
    try:
        return server.store.preset(name, param="model")
    except NotFoundError as error:
        raise RequestError(
            f"There is no model {model[:120]!r} here: {error.message[:600]}",
            param="model",
            status=404,
            code="model_not_found",
        ) from None


def _own_spec(steering: Any, xargs: dict[str, Any] | None) -> tuple[SteeringSpec | None, str]:
    for name in xargs or {}:
        if name != "steering":
            raise RequestError(
                f"vllm_xargs.{name[:80]} is not known here; only vllm_xargs.steering is.",
                param=f"vllm_xargs.{name[:80]}",
                code="unknown_field",
            )
    other = (xargs or {}).get("steering")
    if steering is not None and other is not None:
        raise RequestError(
            "steering and vllm_xargs.steering are two ways to say the same; give one of them.",
            param="vllm_xargs.steering",
        )
    if other is not None:
        path = "vllm_xargs.steering"
        if not isinstance(other, str):
            raise RequestError(f"{path} must be a string that holds JSON.", param=path)
        return read_spec(other, path=path), path
    if steering is None:
        return None, "steering"
    return read_spec(steering, path="steering"), "steering"


def _joined(
    preset: SteeringSpec, own: SteeringSpec | None, *, name: str, path: str
) -> tuple[SteeringSpec, dict[tuple[str, int], _Source]]:
    joined: dict[str, list[Any]] = {kind: [] for kind in TERM_KINDS}
    sources: dict[tuple[str, int], _Source] = {}
    sides = [(preset, name)] if own is None else [(preset, name), (own, path)]
    for spec, root in sides:
        for kind, into in joined.items():
            for i, term in enumerate(getattr(spec, kind)):
                sources[kind, len(into)] = _Source(
                    root, f"{root}.{kind}[{i}]", term.when is not None
                )
                # Gated here and not by the whole's `when`, which would gate both sides.
                into.append(term.model_copy(update={"when": term.when or spec.when}))
    for kind, terms in joined.items():
        if len(terms) > MAX_TERMS:
            raise SpecError(
                f"{name} and {path}.{kind} have {len(terms)} terms together; at most {MAX_TERMS} "
                "are allowed.",
                param=f"{path}.{kind}",
            )
    return SteeringSpec.model_construct(None, **joined, when=None), sources


def _mapped_back(
    error: TrimtabError, sources: dict[tuple[str, int], _Source], *, root: str
) -> TrimtabError:
    """Return the error with paths of the joined spec rewritten as the client's own.

    What a preset is at fault for has `model` as its param: that is where the client named it.
    """

    def back(found: re.Match[str]) -> str:
        if found[1] is None:
            return root + (found[3] or "")
        source = sources[found[1], int(found[2])]
        if found[3] and not source.has_when:
            return f"{source.root}.when"
        return source.path + (found[3] or "")

    param = _JOINED_PATH.sub(back, error.param or root)
    return RequestError(
        _JOINED_PATH.sub(back, error.message),
        param="model" if param.startswith("preset ") else param,
        status=error.status,
        code=error.code,
    )

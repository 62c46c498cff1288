"""Bearer keys: who may use the API, and who may change what it serves."""

from __future__ import annotations

import hmac

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from trimtab.serving.errors import RequestError, error_response
from trimtab.serving.settings import ServerSettings


class KeyGuard:
    """ASGI middleware that asks for a key on /v1 and /metrics, once any key is set.

    It sits before routing, so that a stranger cannot tell which routes and names exist.

    Args:
        app: the app inside.
        settings: holds the keys.
    """

    def __init__(self, app: ASGIApp, *, settings: ServerSettings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            key = _bearer(Headers(scope=scope).get("authorization", ""))
            is_admin = is_known(key, self.settings.admin_keys)
            is_user = is_known(key, self.settings.api_keys)
            scope.setdefault("state", {})["is_admin"] = is_admin or not self.settings.has_keys
            if _is_guarded(scope["path"]) and self.settings.has_keys and not (is_admin or is_user):
                await error_response(_unauthorized(key))(scope, receive, send)
                return
        await self.app(scope, receive, send)


def is_known(key: str, keys: tuple[str, ...]) -> bool:
    """Return whether the key is among those given, in time that tells nothing about them."""
    # latin-1 is how header bytes were decoded; every key is compared, also after a match.
    given = key.encode("latin-1", "replace")
    found = [hmac.compare_digest(given, known.encode()) for known in keys]
    return any(found)


def require_admin(request: Request) -> None:
    """Route dependency: refuse those who may not change vectors, classifiers and presets.

    Raises:
        RequestError: 403, saying how to set or use an admin key.
    """
    if request.state.is_admin:
        return
    settings: ServerSettings = request.app.state.server.settings
    mend = (
        "send one of the admin keys"
        if settings.admin_keys
        else "start the server with --admin-key (or TRIMTAB_ADMIN_KEYS) and send that key"
    )
    raise RequestError(
        f"Changing vectors, classifiers and presets needs an admin key: {mend}.",
        status=403,
        code="admin_key_required",
    )


def _bearer(header: str) -> str:
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _is_guarded(path: str) -> bool:
    # By segment, so that a path prefix set in front of the app does not lift the guard.
    parts = path.split("/")
    return "v1" in parts or "metrics" in parts


def _unauthorized(key: str) -> RequestError:
    return RequestError(
        "This server needs a key: send the header 'Authorization: Bearer KEY'."
        if not key
        else "The key sent is not one of this server's.",
        status=401,
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )

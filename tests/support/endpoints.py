"""Every endpoint the server has, and which of them a run of the tests has reached with success.

The endpoints come from the tables that requests are routed by. While ``OUTRIDER_ENDPOINTS`` names a folder, each
request that an engine, a core table or the front answered without an error is noted together with the test file that
made it; of servers in processes of their own, what clients in the tests' process sent and were answered. Tests that
only ask everything do not count: they would say nothing about what an endpoint does.
"""

from __future__ import annotations

import atexit
import functools
import http.client
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from plugin_api.description import PathDescription
from plugin_api.framework import PathEngine
from plugin_api.request import Operation
from plugin_api.testing import make_context
from sidecar.api.front import Front
from sidecar.api.raw_paths import RAW_PATHS
from sidecar.auth.approle import AppRole
from sidecar.auth.userpass import Userpass
from sidecar.engines.kv_v1 import KVv1
from sidecar.engines.kv_v2 import KVv2
from sidecar.engines.transit.engine import Transit
from sidecar.request.cubbyhole import Cubbyhole
from sidecar.request.openapi import path_regex
from sidecar.request.route_table import RouteBackend
from sidecar.request.types import HttpRequest

FOLDER_VARIABLE = "OUTRIDER_ENDPOINTS"
VERBS = {
    Operation.READ: "GET",
    Operation.LIST: "LIST",
    Operation.UPDATE: "POST",
    Operation.PATCH: "PATCH",
    Operation.DELETE: "DELETE",
}
ENGINES: dict[type[PathEngine], str] = {
    KVv1: "kv version 1",
    KVv2: "kv version 2",
    Transit: "transit",
    AppRole: "auth/approle",
    Userpass: "auth/userpass",
}
_OF_METHOD = {
    "GET": Operation.READ,
    "HEAD": Operation.READ,
    "LIST": Operation.LIST,
    "PUT": Operation.UPDATE,
    "POST": Operation.UPDATE,
    "PATCH": Operation.PATCH,
    "DELETE": Operation.DELETE,
}
_SENT = "sent"
"""The group of what a client sent: the path is its whole path, the template is not known yet."""

CORE_GROUPS = {"sys/": "sys", "auth/token/": "auth/token", "cubbyhole/": "cubbyhole"}
_ASKS_EVERYTHING = ("test_openapi.py", "test_openapi_fuzz.py")
_FILES_MAX = 3

Endpoint = tuple[str, str, str]
"""(group, verb, template)."""

Described = Sequence[tuple[str, Sequence[PathDescription]]]
"""The paths of each mount that every server has, by the mount's path."""


def engine_endpoints() -> list[Endpoint]:
    """Those of every engine and auth method that ships with the server."""
    found = []
    for engine, group in ENGINES.items():
        found += endpoints_of(group, engine(make_context()).describe())
    return found


def endpoints_of(group: str, descriptions: Iterable[PathDescription]) -> list[Endpoint]:
    """One for each operation."""
    return [(group, VERBS[operation], one.template) for one in descriptions for operation in one.operations]


@functools.lru_cache(maxsize=1024)
def _regex(template: str, parameters: tuple[tuple[str, str], ...]) -> re.Pattern[str]:
    return path_regex(template, dict(parameters))


def _template(descriptions: Iterable[PathDescription], rest: str) -> str:
    trimmed = rest.rstrip("/")
    for one in descriptions:
        if _regex(one.template, tuple(one.parameters.items())).fullmatch(trimmed):
            return one.template
    return ""


class Recorder:
    """Notes what was answered; :meth:`save` writes it when the process ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[Endpoint, set[str]] = {}

    def install(self) -> None:
        """Listen from now on."""
        self._wrap(RouteBackend, "handle", self._of_route)
        self._wrap(Cubbyhole, "handle", self._of_cubbyhole)
        self._wrap(PathEngine, "handle", self._of_engine)
        self._wrap(Front, "handle", self._of_front)
        self._listen_to_clients()
        atexit.register(self.save)

    def _wrap(self, owner: type, name: str, note: Callable[..., None]) -> None:
        original: Callable[..., Awaitable[Any]] = getattr(owner, name)

        @functools.wraps(original)
        async def noting(*arguments: Any, **options: Any) -> Any:
            answer = await original(*arguments, **options)
            if answer is None or answer.status < 400:
                note(*arguments)
            return answer

        setattr(owner, name, noting)

    def _listen_to_clients(self) -> None:
        """urllib's, requests' and so hvac's connections are all of this one class."""
        ask, hear = http.client.HTTPConnection.putrequest, http.client.HTTPConnection.getresponse
        asked: dict[int, tuple[str, str]] = {}

        def putrequest(connection: Any, method: str, url: str, *arguments: Any, **options: Any) -> None:
            asked[id(connection)] = method, url
            ask(connection, method, url, *arguments, **options)

        def getresponse(connection: Any) -> http.client.HTTPResponse:
            answer = hear(connection)
            method, url = asked.pop(id(connection), ("", ""))
            if answer.status < 400:
                self._of_client(method, url)
            return answer

        for function in (putrequest, getresponse):
            setattr(http.client.HTTPConnection, function.__name__, function)

    def _of_client(self, method: str, url: str) -> None:
        parts = urlsplit(url)
        path, operation = unquote(parts.path).removeprefix("/v1/"), _OF_METHOD.get(method)
        if operation is Operation.READ and parse_qs(parts.query).get("list") == ["true"]:
            operation = Operation.LIST
        if operation is not None and parts.path.startswith(tuple(f"/v1/{mount}" for mount in CORE_GROUPS)):
            self._note(_SENT, operation, path)

    def _of_route(self, backend: RouteBackend, call: Any, rest: str) -> None:
        group = {"system": "sys", "token": "auth/token"}.get(backend.type_name)
        if group is not None:
            self._note(group, call.operation, _template(backend.describe(), rest))

    def _of_cubbyhole(self, backend: Cubbyhole, call: Any, rest: str) -> None:
        self._note("cubbyhole", call.operation, _template(backend.describe(), rest or "x"))

    def _of_engine(self, engine: PathEngine, request: Any) -> None:
        group = ENGINES.get(type(engine))
        if group is not None:
            self._note(group, request.operation, _template(engine.describe(), request.path))

    def _of_front(self, front: Front, request: HttpRequest) -> None:
        if request.path in {one.template for one in RAW_PATHS} and request.method in _OF_METHOD:
            self._note("sys", _OF_METHOD[request.method], request.path.removeprefix("sys/"))

    def _note(self, group: str, operation: Operation, template: str) -> None:
        file = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]
        if group and template and file and not file.endswith(_ASKS_EVERYTHING):
            known = Operation.UPDATE if operation is Operation.CREATE else operation
            self._seen.setdefault((group, VERBS[known], template), set()).add(file)

    def save(self) -> None:
        """One file for each process."""
        self._folder.mkdir(parents=True, exist_ok=True)
        rows = [[*endpoint, sorted(files)] for endpoint, files in sorted(self._seen.items())]
        (self._folder / f"{os.getpid()}.json").write_text(json.dumps(rows))


def install_recorder() -> None:
    """Where the environment asks for it."""
    folder = os.environ.get(FOLDER_VARIABLE, "")
    if folder:
        Recorder(Path(folder)).install()


def recorded(folder: Path, described: Described = ()) -> dict[Endpoint, list[str]]:
    """What all processes of a run have noted: endpoint → test files, a few for each. What clients sent counts for the
    paths in ``described``."""
    merged: dict[Endpoint, set[str]] = {}
    for path in sorted(folder.glob("*.json")):
        for group, verb, template, files in json.loads(path.read_text()):
            endpoint = (group, verb, template) if group != _SENT else _endpoint_of(described, verb, template)
            if endpoint is not None:
                merged.setdefault(endpoint, set()).update(files)
    return {endpoint: sorted(files)[:_FILES_MAX] for endpoint, files in sorted(merged.items())}


def _endpoint_of(described: Described, verb: str, path: str) -> Endpoint | None:
    for mount, descriptions in described:
        if path.startswith(mount):
            asked = [one for one in descriptions if verb in {VERBS[operation] for operation in one.operations}]
            template = _template(asked, path.removeprefix(mount))
            if template:
                return CORE_GROUPS[mount], verb, template
    return None

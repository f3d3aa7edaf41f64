"""Every endpoint the server has, and which of them a run of the tests has reached with success.

The endpoints come from the tables that requests are routed by. While ``OUTRIDER_ENDPOINTS`` names a folder, each
request that an engine, a core table or the front answered without an error is noted together with the test file that
made it. Tests that only ask everything do not count: they would say nothing about what an endpoint does.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

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
_ASKS_EVERYTHING = ("test_openapi.py", "test_openapi_fuzz.py")
_FILES_MAX = 3

Endpoint = tuple[str, str, str]
"""(group, verb, template)."""


def engine_endpoints() -> list[Endpoint]:
    """Those of every engine and auth method that ships with the server."""
    found = []
    for engine, group in ENGINES.items():
        found += endpoints_of(group, engine(make_context()).describe())
    return found


def endpoints_of(group: str, descriptions: Iterable[PathDescription]) -> list[Endpoint]:
    """One for each operation."""
    return [(group, VERBS[operation], one.template) for one in descriptions for operation in one.operations]


def raw_endpoints() -> list[Endpoint]:
    """Those that a node of any role answers itself."""
    without_mount = [(one.template.removeprefix("sys/"), one) for one in RAW_PATHS]
    return [("sys", VERBS[operation], name) for name, one in without_mount for operation in one.operations]


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
        operations = {"GET": Operation.READ, "HEAD": Operation.READ, "PUT": Operation.UPDATE, "POST": Operation.UPDATE}
        if request.path in {one.template for one in RAW_PATHS} and request.method in operations:
            self._note("sys", operations[request.method], request.path.removeprefix("sys/"))

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


def recorded(folder: Path) -> dict[Endpoint, list[str]]:
    """What all processes of a run have noted: endpoint → test files, a few for each."""
    merged: dict[Endpoint, set[str]] = {}
    for path in sorted(folder.glob("*.json")):
        for group, verb, template, files in json.loads(path.read_text()):
            merged.setdefault((group, verb, template), set()).update(files)
    return {endpoint: sorted(files)[:_FILES_MAX] for endpoint, files in sorted(merged.items())}

"""The OpenAPI document: as true as the routes it is made from."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from plugin_api.description import templates
from plugin_api.errors import InvalidRequest
from plugin_api.framework import Fields, FieldSpec, FieldType, Path, PathEngine
from plugin_api.request import Operation, Request
from plugin_api.testing import make_context
from sidecar.api.raw_paths import RAW_PATHS
from sidecar.api.sys_parameters import TEMPLATES
from sidecar.request.call import Answer, Call
from sidecar.request.cubbyhole import Cubbyhole
from sidecar.request.openapi import MountDescription, document, matching
from sidecar.request.route_table import INT, STRING, Route, RouteBackend, takes
from tests.support.endpoints import ENGINES
from tests.support.service_node import Harness, running, with_bob, with_kv

METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "LIST")


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        await with_kv(harness)
        await with_bob(harness)
        await harness.call("POST", "sys/mounts/transit", {"type": "transit"})
        await harness.call("POST", "sys/auth/approle", {"type": "approle"})
        yield harness


async def served(node: Harness, **query: str) -> dict[str, Any]:
    suffix = "&".join(f"{name}={value}" for name, value in query.items())
    reply = await node.call("GET", f"sys/internal/specs/openapi?{suffix}")
    assert reply.status == 200
    return dict(reply.body)


async def test_every_mount_is_in_it_and_what_is_not_routed_is_not(node: Harness) -> None:
    paths = (await served(node))["paths"]
    for path in (
        "/sys/mounts/{path}",
        "/sys/health",
        "/auth/token/create",
        "/secret/data/{path}",
        "/transit/encrypt/{name}",
        "/auth/userpass/login/{username}",
        "/auth/approle/role/{role_name}/secret-id",
        "/cubbyhole/{path}",
    ):
        assert path in paths
    assert set(paths["/secret/data/{path}"]) == {"get", "post", "patch", "delete"}
    assert paths["/secret/metadata/{path}/"]["get"]["parameters"][-1]["name"] == "list"
    assert "requestBody" in paths["/secret/data/{path}"]["post"]
    assert paths["/auth/userpass/login/{username}"]["post"]["security"] == []
    assert paths["/sys/rotate"]["post"]["x-vault-sudo"] is True
    assert "/kv/data/{path}" not in paths
    ids = [operation["operationId"] for item in paths.values() for operation in item.values()]
    assert len(ids) == len(set(ids))


async def test_mounts_can_be_shown_by_their_kind(node: Harness) -> None:
    paths = (await served(node, generic_mount_paths="true"))["paths"]
    assert "/{kv_mount_path}/data/{path}" in paths
    assert "/auth/{userpass_mount_path}/login/{username}" in paths
    assert "/secret/data/{path}" not in paths


async def test_a_caller_sees_the_mounts_it_may_use(node: Harness) -> None:
    token = await node.token(
        'path "secret/*" { capabilities = ["read"] }\npath "sys/internal/specs/*" { capabilities = ["read"] }'
    )
    reply = await node.call("GET", "sys/internal/specs/openapi", token=token)
    assert any(path.startswith("/secret/") for path in reply.body["paths"])
    assert not any(path.startswith("/transit/") for path in reply.body["paths"])
    assert (await node.call("GET", "sys/internal/specs/openapi", token=None)).status == 403


async def test_help_shows_the_part_that_serves_the_path(node: Harness) -> None:
    help_text = (await node.call("GET", "secret/data/a/b?help=1")).body
    assert list(help_text["openapi"]["paths"]) == ["/secret/data/{path}"]
    assert list((await node.call("GET", "sys/mounts/x/tune?help=1")).body["openapi"]["paths"]) == [
        "/sys/mounts/{path}",
        "/sys/mounts/{path}/tune",
    ]


async def test_every_route_of_the_core_declares_its_parameters(node: Harness) -> None:
    """None would let anything through, and leave the document silent."""
    undeclared = []
    for path, backend in node.service.mounts.router.items():
        if isinstance(backend, RouteBackend):
            undeclared += [path + one.template for one in backend.describe() if one.free_form or not one.help]
    assert undeclared == ["sys/wrapping/wrap"]


async def test_every_path_has_help(node: Harness) -> None:
    """Of every engine, auth method and core table: what the path does, in ``?help=1`` and in the document."""
    without = [
        f"{group} {one.template}"
        for engine, group in ENGINES.items()
        for one in engine(make_context()).describe()
        if not one.help
    ]
    for path, backend in node.service.mounts.router.items():
        if isinstance(backend, RouteBackend | Cubbyhole):
            without += [path + one.template for one in backend.describe() if not one.help]
    assert without == []
    for path in ("delete", "undelete", "destroy"):
        text = (await node.call("GET", f"secret/{path}/a?help=1")).body["help"]
        assert "versions of a secret" in text.lower()


async def test_only_what_comes_in_the_query_is_shown_there(node: Harness) -> None:
    paths = (await served(node))["paths"]

    def query(path: str, method: str) -> set[str]:
        return {one["name"] for one in paths[path][method].get("parameters", ()) if one["in"] == "query"}

    assert query("/secret/data/{path}", "get") == {"version"}
    assert query("/secret/data/{path}", "delete") == set()
    assert query("/secret/config", "get") == set()
    assert query("/secret/subkeys/{path}", "get") == {"version", "depth"}
    assert query("/secret/metadata/{path}/", "get") == {"list"}
    assert query("/sys/mounts/{path}", "get") == set()
    assert query("/sys/mounts/{path}", "delete") == {"force"}
    assert query("/sys/rekey/init", "delete") == {"nonce"}
    assert query("/sys/rekey/init", "get") == set()
    assert query("/sys/internal/specs/openapi", "get") == {"generic_mount_paths", "context"}
    assert query("/auth/token/lookup", "get") == {"token"}
    assert query("/sys/policies/acl/{name}", "get") == set()
    posted = paths["/secret/data/{path}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"data", "options", "version"} == set(posted["properties"])


async def test_what_the_query_is_said_to_take_it_takes(node: Harness) -> None:
    """One of each kind that is both in a body and in a query."""
    for value in ("1", "2"):
        await node.call("POST", "secret/data/a", {"data": {"x": value}})
    assert (await node.call("GET", "secret/data/a?version=1")).data["data"] == {"x": "1"}
    created = (await node.call("POST", "auth/token/create", {"policies": ["app"]})).body["auth"]
    found = await node.call("GET", f"auth/token/lookup?token={created['client_token']}")
    assert found.data["accessor"] == created["accessor"]
    begun = (await node.call("PUT", "sys/rekey/init", {"secret_shares": 1, "secret_threshold": 1})).body
    cancelled = await node.call("DELETE", f"sys/rekey/init?nonce={begun['nonce']}", token=None)
    assert cancelled.status == 204
    wrapped = await node.call("GET", "secret/data/a", X_Vault_Wrap_TTL="60")
    token = wrapped.body["wrap_info"]["token"]
    assert (await node.call("GET", f"sys/wrapping/lookup?token={token}", token=None)).status == 200
    await node.call("POST", "auth/approle/role/r", {})
    for kind, name in (("secret-id", "secret_id"), ("secret-id-accessor", "secret_id_accessor")):
        made = (await node.call("POST", "auth/approle/role/r/secret-id", {})).data
        gone = await node.call("DELETE", f"auth/approle/role/r/{kind}/destroy?{name}={made[name]}")
        assert gone.status == 204
        left = await node.call(
            "POST", "auth/approle/role/r/secret-id-accessor/lookup", {"secret_id_accessor": made["secret_id_accessor"]}
        )
        assert left.status == 404


async def status_of(node: Harness, verb: str, path: str) -> int:
    headers = {"X-Vault-Token": node.root, "Content-Type": "application/merge-patch+json"}
    async with node.session.request(verb, f"{node.address}/v1/{path}", data=b"{}", headers=headers) as answer:
        return answer.status


async def test_no_parameters_are_declared_for_a_route_that_is_not_there(node: Harness) -> None:
    system = node.service.mounts.router.get("sys/")
    assert isinstance(system, RouteBackend)
    plain = {template.replace("*}", "}") for template in TEMPLATES}
    assert plain <= {one.template for one in system.describe()}


async def test_the_methods_of_the_document_are_those_that_are_served(node: Harness) -> None:
    """For each path of the core that takes no parameter in the path: a method is refused as unsupported exactly where
    the document does not have it."""
    skipped = ("sys/seal", "sys/step-down", "sys/monitor", "sys/pprof/profile", "auth/token/revoke-self", "sys/rotate")
    wrong = []
    for path, backend in [("", None), *node.service.mounts.router.items()]:
        if backend is not None and not isinstance(backend, RouteBackend):
            continue
        for one in RAW_PATHS if backend is None else backend.describe():
            full = path + one.template
            if "{" in one.template or full in skipped:
                continue
            verbs = {"READ": "GET", "UPDATE": "POST", "DELETE": "DELETE", "LIST": "LIST", "PATCH": "PATCH"}
            documented = {verbs[operation.name] for operation in one.operations}
            for verb in verbs.values():
                status = await status_of(node, verb, full)
                if (status == 405) == (verb in documented):
                    wrong.append((verb, full, status))
    assert wrong == []


async def test_what_is_not_open_wants_a_token(node: Harness) -> None:
    opened = []
    for path, item in (await served(node))["paths"].items():
        for method, operation in item.items():
            if not operation["security"]:
                continue
            url = f"{node.address}/v1{re.sub('[{][^}]*[}]', 'x', path)}"
            async with node.session.request(method.upper(), url, json={}) as answer:
                if answer.status < 400:
                    opened.append((method, path, answer.status))
    assert opened == []


def test_two_spellings_of_one_path_are_one() -> None:
    tables = [
        Route(f"random/{{{name}}}", {Operation.UPDATE: _nothing}, fields={}).describe() for name in ("bytes", "source")
    ]
    paths = document([MountDescription("m/", "m", tuple(tables))], "1")["paths"]
    assert list(paths) == ["/m/random/{bytes}"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("config", ["config"]),
        (r"keys/(?P<name>\w(?:[\w.-]*\w)?)/x", ["keys/{name}/x"]),
        ("hash(?:/(?P<a>[^/]+))?(?:/(?P<b>[0-9]+))?", ["hash", "hash/{b}", "hash/{a}", "hash/{a}/{b}"]),
        ("keys/?", ["keys"]),
        (r"a\.b(?P<c>[()]+)", ["a.b{c}"]),
        ("(?P<path>.*)", ["{path}"]),
        ("free/.*", ["free/{rest}"]),
    ],
)
def test_templates_of_patterns(pattern: str, expected: list[str]) -> None:
    found = templates(pattern)
    assert [template for template, _ in found] == expected
    for template, parameters in found:
        assert re.findall(r"\{(\w+)\}", template) == list(parameters)


async def test_an_odd_pattern_of_a_plugin_hides_nothing_else() -> None:
    class Odd(PathEngine):
        type_name = "odd"

        def paths(self) -> list[Path]:
            return [Path("(a|b)+", {}, {Operation.READ: _read}), Path("plain", {}, {Operation.READ: _read})]

    async def _read(request: Request, fields: Fields) -> None:
        return None

    assert [one.template for one in Odd(make_context()).describe()] == ["plain"]


@pytest.mark.parametrize("pattern", ["a|b", "[ab]", "a*", "(a", "a.b", "a+", "a.*b"])
def test_patterns_without_a_template(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        templates(pattern)


async def _nothing(call: Call, params: object) -> Answer | None:
    return None


async def test_a_handler_sees_what_its_route_declares_and_nothing_else() -> None:
    seen: list[dict[str, Any]] = []

    async def handler(call: Call, params: object) -> Answer:
        seen.append(dict(call.data))
        return Answer({"ok": True})

    backend = RouteBackend("t", [Route("a/{name}", {Operation.UPDATE: handler}, fields=takes(n=INT, text=STRING))])
    call = Call(Operation.UPDATE, "t/a/x", {"n": "5", "text": None, "name": "x", "other": 1}, "id")
    answer = await backend.handle(call, "a/x")
    assert seen == [{"n": 5}]
    assert call.data["other"] == 1
    assert answer is not None
    assert answer.warnings == ["Endpoint ignored these unrecognized parameters: [other]"]
    with pytest.raises(InvalidRequest, match='field "n"'):
        await backend.handle(Call(Operation.UPDATE, "t/a/x", {"n": "many"}, "id"), "a/x")


def test_matching_is_by_the_template() -> None:
    route = Route("a/{x}/b", {Operation.READ: _nothing}, fields={"x": FieldSpec(FieldType.STRING)}).describe()
    mount = MountDescription("m/", "m", (route,))
    assert matching(mount, "a/1/b").paths == (route,)
    assert matching(mount, "a/1/2/b").paths == ()

"""Schemathesis against the OpenAPI document that the server itself serves: no 5xx, and no answer that the document does
not promise. Bounded: the same few cases for each operation in every run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from sidecar.api.sys_tools import SysTools
from sidecar.request.call import Answer, Call
from tests.support.service_node import Harness, running, with_bob, with_kv

CASES_PER_OPERATION = 3
# They end the node, the caller's token, or go on for ever.
ENDING = ("/sys/seal", "/sys/step-down", "/sys/monitor", "/sys/pprof/profile")
REVOKING = ("/auth/token/revoke-self",)
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@dataclass(frozen=True)
class Served:
    """A node in a thread of its own."""

    address: str
    root: str
    loop: asyncio.AbstractEventLoop
    harness: Harness


@contextmanager
def serving() -> Iterator[Served]:
    ready: Future[Served] = Future()
    done = threading.Event()

    async def serve() -> None:
        async with running() as harness:
            await with_kv(harness)
            await harness.call("POST", "sys/mounts/kv1", {"type": "kv"})
            await harness.call("POST", "sys/mounts/transit", {"type": "transit"})
            await with_bob(harness)
            await harness.call("POST", "sys/auth/approle", {"type": "approle"})
            ready.set_result(Served(harness.address, harness.root, asyncio.get_running_loop(), harness))
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="node")
    thread.start()
    try:
        yield ready.result(timeout=180)
    finally:
        done.set()
        thread.join()


@pytest.fixture(scope="module")
def node() -> Iterator[Served]:
    with serving() as served:
        yield served


def operations(document: dict[str, Any]) -> list[Any]:
    schema = schemathesis.openapi.from_dict(document)
    found = [result.ok() for result in schema.get_all_operations()]
    return [one for one in found if one.path not in ENDING + REVOKING]


def fuzz(operation: Any, served: Served, cases: int) -> None:
    @seed(1)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        response = case.call(base_url=f"{served.address}/v1", headers={"X-Vault-Token": served.root}, timeout=120)
        case.validate_response(response, checks=list(CHECKS))

    check()


def document_of(served: Served) -> dict[str, Any]:
    response = requests.get(
        f"{served.address}/v1/sys/internal/specs/openapi", headers={"X-Vault-Token": served.root}, timeout=120
    )
    assert response.status_code == 200
    return dict(response.json())


def test_no_operation_breaks_what_the_document_promises(node: Served) -> None:
    problems = []
    asked = operations(document_of(node))
    assert len(asked) > 150
    for operation in asked:
        try:
            fuzz(operation, node, CASES_PER_OPERATION)
        except FailureGroup as error:
            problems.append(f"{operation.method.upper()} {operation.path}: {type(error).__name__}: {error}")
    assert not problems, "\n\n".join(problems)


async def broken(self: object, call: Call, params: object) -> Answer:
    raise RuntimeError("a defect")


async def unpromised(self: object, call: Call, params: object) -> Answer:
    return Answer(raw={"not": "an envelope"})


@pytest.mark.parametrize(("handler", "failure"), [(broken, "ServerError"), (unpromised, "JsonSchemaError")])
def test_control_a_defect_is_found(monkeypatch: pytest.MonkeyPatch, handler: Any, failure: str) -> None:
    monkeypatch.setattr(SysTools, "_random", handler)
    with serving() as served:
        random = [one for one in operations(document_of(served)) if one.path == "/sys/tools/random"]
        with pytest.raises(FailureGroup) as found:
            fuzz(random[0], served, 1)
    assert failure in {type(one).__name__ for one in found.value.exceptions}

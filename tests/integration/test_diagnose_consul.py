"""``operator diagnose`` against a real Consul: with rights, without them, and without changing anything."""

from __future__ import annotations

from pathlib import Path

from sidecar.diagnose import Finding, diagnose
from tests.support.consul_server import ConsulServer
from tests.unit.test_diagnose import flat, write_config


async def found(folder: Path, server: ConsulServer, path: str, token: str) -> dict[str, Finding]:
    storage = f'storage "consul" {{ address = "{server.address}"\n token = "{token}"\n path = "{path}" }}'
    return flat(await diagnose([str(write_config(folder, storage=storage))], {}))


async def test_a_consul_with_and_without_rights(tmp_path: Path, consul_server: ConsulServer, consul_path: str) -> None:
    checks = await found(tmp_path, consul_server, consul_path, consul_server.token)
    assert checks["Check Storage Access"].status in ("success", "warning"), "slow, on a loaded machine"
    assert checks["Check Storage Access"].message.startswith("a consistent read took ")
    assert consul_server.call("GET", f"kv/{consul_path}?keys").status == 404, "nothing was written"

    denied = await found(tmp_path, consul_server, "elsewhere/", consul_server.token)
    check = denied["Check Storage Access"]
    assert (check.status, "consul-acl-policy.hcl" in check.advice) == ("failure", True), check
    unknown = await found(tmp_path, consul_server, consul_path, "00000000-0000-4000-8000-000000000000")
    assert unknown["Check Storage Access"].status == "failure"

"""Auto-unseal, its keys and its changes on real processes: one node on an embedded store, clusters on real Consul."""

from __future__ import annotations

import contextlib
import http.client
import os
from pathlib import Path
from typing import Any

import hvac
import pytest

from tests.support.cluster import (
    STEADY,
    Cluster,
    Node,
    Reply,
    consul_storage,
    embedded_storage,
    replicate,
    wait_in_step,
)
from tests.support.consul_server import ConsulServer


def static_seal(home: Path, key_id: str = "k1", *, previous: str = "", disabled: bool = False) -> str:
    """A stanza whose keys lie in files named by their ids, made when first asked for."""
    names = {"current": key_id, "previous": previous}
    lines = []
    for which, name in names.items():
        if not name:
            continue
        path = home / f"{name}.key"
        if not path.exists():
            path.write_bytes(os.urandom(32))
            path.chmod(0o600)
        lines.append(f'  {which}_key_id = "{name}"\n  {which}_key = "file://{path}"\n')
    return f'seal "static" {{\n{"".join(lines)}{off(disabled)}}}\n'


def transit_seal(server: Node, token: str, *, disabled: bool = False) -> str:
    return (
        f'seal "transit" {{\n  address = "{server.address}"\n  token = "{token}"\n'
        f'  key_name = "autounseal"\n  mount_path = "transit/"\n{off(disabled)}}}\n'
    )


def off(disabled: bool) -> str:
    return '  disabled = "true"\n' if disabled else ""


def seal_status(node: Node) -> dict[str, Any]:
    return dict(node.call("GET", "sys/seal-status").body)


def opens(node: Node, statuses: tuple[int, ...] = (200,)) -> None:
    def unsealed() -> bool:
        health = node.health()
        return health is not None and health.status in statuses

    node.wait_until("unseal itself", unsealed)


def init(node: Node, shares: int = 3, threshold: int = 2, recovery: bool = True) -> tuple[list[str], str]:
    kind = "recovery" if recovery else "secret"
    reply = node.call("PUT", "sys/init", {f"{kind}_shares": shares, f"{kind}_threshold": threshold})
    assert reply.status == 200, reply.errors
    names = ("recovery_keys_base64", "keys") if recovery else ("keys_base64", "recovery_keys")
    assert not reply.body.get(names[1])
    return reply.body[names[0]], reply.body["root_token"]


def give(node: Node, path: str, keys: list[str], **more: Any) -> Reply:
    reply = None
    for key in keys:
        reply = node.call("PUT", path, {"key": key, **more})
        assert reply.status == 200, reply.errors
    assert reply is not None
    return reply


def restarted(node: Node, seals: str) -> None:
    node.stop()
    node.settings = seals
    node.start()


@pytest.fixture
def node(tmp_path: Path) -> Any:
    made = Node("n1", tmp_path, embedded_storage(tmp_path / "store"))
    yield made
    made.kill()


def test_a_static_key_opens_the_node_and_is_rotated(node: Node, tmp_path: Path) -> None:
    node.settings = static_seal(tmp_path, "k1")
    node.start()
    before = seal_status(node)
    assert (before["type"], before["initialized"], before["sealed"]) == ("static", False, True)
    keys, token = init(node)
    opens(node)
    status = seal_status(node)
    assert {name: status[name] for name in ("type", "recovery_seal", "recovery_seal_type", "t", "n", "migration")} == {
        "type": "static",
        "recovery_seal": True,
        "recovery_seal_type": "shamir",
        "t": 2,
        "n": 3,
        "migration": False,
    }
    node.call("POST", "sys/mounts/kv", {"type": "kv"}, token=token)
    assert node.call("POST", "kv/a", {"v": "1"}, token=token).status == 204

    # A restart needs nobody; nor does a SIGKILL.
    node.kill()
    node.start()
    opens(node)
    assert node.call("GET", "kv/a", token=token).data == {"v": "1"}

    # The new key opens by way of the previous one once; after that it alone does.
    restarted(node, static_seal(tmp_path, "k2", previous="k1"))
    opens(node)
    restarted(node, static_seal(tmp_path, "k2"))
    opens(node)
    restarted(node, static_seal(tmp_path, "k1"))
    node.wait_until("say which key it lacks", lambda: '"k2"' in str(seal_status(node).get("warnings")))
    assert seal_status(node)["sealed"]
    log = node.log_path.read_text(encoding="utf-8")
    for name in ("k1", "k2"):
        assert (tmp_path / f"{name}.key").read_bytes().hex() not in log
    # Whoever holds the recovery shares can open it although no key does.
    assert not give(node, "sys/unseal", keys[:2]).body["sealed"]
    opens(node)


def test_who_seals_an_auto_unsealed_node_keeps_it_sealed(node: Node, tmp_path: Path) -> None:
    node.settings = static_seal(tmp_path)
    node.start()
    keys, token = init(node)
    opens(node)
    assert node.call("PUT", "sys/seal", token=token).status == 204
    node.wait_until("be sealed", lambda: seal_status(node)["sealed"])
    wrong = node.call("PUT", "sys/unseal", {"key": "00" * 33})
    assert (wrong.status, wrong.body["progress"], wrong.body["sealed"]) == (200, 1, True)
    refused = node.call("PUT", "sys/unseal", {"key": keys[0]})
    assert (refused.status, seal_status(node)["progress"]) == (400, 0)
    assert not give(node, "sys/unseal", keys[1:]).body["sealed"]
    opens(node)
    node.call("PUT", "sys/seal", token=token)
    restarted(node, node.settings)
    opens(node)


def test_what_recovery_shares_are_asked_for(node: Node, tmp_path: Path) -> None:
    node.settings = static_seal(tmp_path)
    node.start()
    client = hvac.Client(node.address)
    made = client.sys.initialize(recovery_shares=3, recovery_threshold=2)
    assert (made["keys"], len(made["recovery_keys"])) == ([], 3)
    keys = made["recovery_keys_base64"]
    opens(node)
    assert not client.sys.is_sealed()
    nonce = node.call("PUT", "sys/generate-root/attempt", {}).body["nonce"]
    assert give(node, "sys/generate-root/update", keys[:2], nonce=nonce).body["complete"]

    # Recovery shares are renewed; the auto seal goes on opening.
    started = node.call("PUT", "sys/rekey-recovery-key/init", {"secret_shares": 2, "secret_threshold": 2}).body
    assert (started["started"], started["required"], started["n"]) == (True, 2, 2)
    done = give(node, "sys/rekey-recovery-key/update", keys[1:], nonce=started["nonce"]).body
    new = done["keys_base64"]
    assert (done["complete"], len(new)) == (True, 2)
    # The auto seal's own part is renewed by the new shares, and nobody gets a key.
    for wrong in (
        {"secret_shares": 3, "secret_threshold": 2},
        {"secret_shares": 1, "secret_threshold": 1, "backup": True},
    ):
        assert node.call("PUT", "sys/rekey/init", wrong).status == 400
    started = node.call("PUT", "sys/rekey/init", {"secret_shares": 1, "secret_threshold": 1, "stored_shares": 1}).body
    done = give(node, "sys/rekey/update", new, nonce=started["nonce"]).body
    assert (done["complete"], done["keys"]) == (True, [])
    restarted(node, node.settings)
    opens(node)
    attempt = node.call("PUT", "sys/generate-root/attempt", {}).body
    assert give(node, "sys/generate-root/update", new, nonce=attempt["nonce"]).body["complete"]


def test_migration_from_shares_to_static_and_transit_and_back(node: Node, tmp_path: Path) -> None:
    other = Node("other", tmp_path / "other", embedded_storage(tmp_path / "other" / "store"))
    try:
        node.start()
        keys, token = init(node, recovery=False)
        give(node, "sys/unseal", keys[:2])
        opens(node)
        assert node.call("PUT", "sys/unseal", {"key": keys[0], "migrate": True}).status == 200, "unsealed: as ever"

        def migrate(seals: str, kind: str) -> None:
            restarted(node, seals)
            assert seal_status(node)["migration"]
            plain = node.call("PUT", "sys/unseal", {"key": keys[0]})
            assert (plain.status, "give every share with migrate" in plain.errors[0]) == (400, True)
            give(node, "sys/unseal", keys[1:], migrate=True)
            opens(node)
            node.wait_until("finish the change", lambda: seal_status(node)["type"] == kind)
            status = seal_status(node)
            assert (status["migration"], status["recovery_seal"]) == (False, kind != "shamir")

        # shamir -> static: the old stanza, without "disabled", is what the node opens with from now on.
        migrate(static_seal(tmp_path), "static")
        restarted(node, static_seal(tmp_path))
        opens(node)

        # static -> transit, of another server
        seal_token = transit_server(other)
        migrate(static_seal(tmp_path, disabled=True) + transit_seal(other, seal_token), "transit")
        restarted(node, transit_seal(other, seal_token))
        opens(node)

        # transit -> shamir
        migrate(transit_seal(other, seal_token, disabled=True), "shamir")
        other.kill()
        restarted(node, "")
        no_other = node.call("PUT", "sys/unseal", {"key": keys[0], "migrate": True})
        assert no_other.errors == ["can't perform a seal migration, no migration seal found"]
        assert not give(node, "sys/unseal", keys[:2]).body["sealed"]
        opens(node)
        assert node.call("GET", "auth/token/lookup-self", token=token).status == 200
        assert seal_token not in node.log_path.read_text(encoding="utf-8")
    finally:
        other.kill()


def transit_server(node: Node) -> str:
    """Start a node that serves as another's seal; returns the token for it."""
    node.start()
    keys, root = init(node, 1, 1, recovery=False)
    give(node, "sys/unseal", keys)
    opens(node)
    node.call("POST", "sys/mounts/transit", {"type": "transit"}, token=root)
    assert node.call("POST", "transit/keys/autounseal", {}, token=root).status in (200, 204)
    policy = "".join(
        f'path "transit/{what}/autounseal" {{ capabilities = ["update"] }}\n' for what in ("encrypt", "decrypt")
    )
    node.call("PUT", "sys/policies/acl/seal", {"policy": policy}, token=root)
    made = node.call("POST", "auth/token/create", {"policies": ["seal"], "period": "1h", "no_parent": True}, token=root)
    return str(made.body["auth"]["client_token"])


def test_a_node_waits_for_its_transit_server(node: Node, tmp_path: Path) -> None:
    other = Node("other", tmp_path / "other", embedded_storage(tmp_path / "other" / "store"))
    try:
        seal_token = transit_server(other)
        node.settings = transit_seal(other, seal_token)
        node.start()
        init(node)
        opens(node)
        node.stop()
        other.kill()
        node.start()
        node.wait_until("say what it waits for", lambda: "cannot be reached" in str(seal_status(node).get("warnings")))
        assert (seal_status(node)["sealed"], node.running) == (True, True)
        # The other server comes back sealed, which is another reason to wait.
        other.start()
        node.wait_until("be told why", lambda: "503" in str(seal_status(node).get("warnings")))
        node.stop()
        refused = Node("n2", tmp_path, embedded_storage(tmp_path / "second"), settings=node.settings)
        refused.start()
        try:
            reply = refused.call("PUT", "sys/init", {"recovery_shares": 1, "recovery_threshold": 1})
            assert (reply.status, "nothing was changed" in reply.errors[0]) == (503, True)
            assert refused.call("GET", "sys/init").body == {"initialized": False}
        finally:
            refused.kill()
    finally:
        other.kill()


@pytest.mark.parametrize("point", ["seal:before-change", "seal:after-change"])
def test_a_crash_in_the_middle_of_a_migration_leaves_one_seal_that_works(
    node: Node, tmp_path: Path, point: str
) -> None:
    node.start()
    keys, token = init(node, recovery=False)
    give(node, "sys/unseal", keys[:2])
    opens(node)
    node.stop()
    node.settings = static_seal(tmp_path)
    node.environment = {"OUTRIDER_FAILPOINTS": f"{point}=kill"}
    node.start()
    node.call("PUT", "sys/unseal", {"key": keys[0], "migrate": True})
    with contextlib.suppress(OSError, http.client.HTTPException):  # it may die before it has answered
        node.call("PUT", "sys/unseal", {"key": keys[1], "migrate": True})
    node.wait_until("die", lambda: not node.running)
    node.process, node.environment = None, {}
    node.start()
    changed = seal_status(node)["type"] == "static"
    assert changed == (point == "seal:after-change")
    if not changed:
        give(node, "sys/unseal", keys[:2], migrate=True)
    opens(node)
    restarted(node, node.settings)
    opens(node)
    assert node.call("GET", "auth/token/lookup-self", token=token).status == 200


def cluster_of(server: ConsulServer, home: Path, name: str, seals: str) -> Cluster:
    storage = consul_storage(server.address, server.token, f"outrider/seals/{name}/")
    return Cluster([Node(f"{name}-{n}", home, storage, cluster_name=name, settings=seals + STEADY) for n in (1, 2)])


def test_every_node_of_a_cluster_opens_itself_also_as_a_secondary(consul_server: ConsulServer, tmp_path: Path) -> None:
    primary = cluster_of(consul_server, tmp_path, "shares", "")
    secondary = cluster_of(consul_server, tmp_path, "auto", static_seal(tmp_path))
    try:
        primary.bootstrap(3, 2)
        secondary.start()
        _, secondary.root_token = init(secondary.nodes[0])
        for node in secondary.nodes:
            opens(node, (200, 429))
        replicate(primary, secondary)
        # Nobody brought the primary's shares: the standby of the secondary has opened itself too.
        for node in secondary.nodes:
            opens(node, (200, 429))
        secondary.stop()
        secondary.start()
        for node in secondary.nodes:
            opens(node, (200, 429))
        wait_in_step(primary, secondary)
        status = seal_status(secondary.wait_active())
        assert (status["type"], status["t"], status["n"]) == ("static", 2, 3), "the recovery shares are the primary's"
        nonce = secondary.call("PUT", "sys/generate-root/attempt", {}).body["nonce"]
        done = give(secondary.wait_active(), "sys/generate-root/update", primary.keys, nonce=nonce)
        assert done.body["complete"]
    finally:
        primary.kill()
        secondary.kill()


def test_a_secondary_without_an_auto_seal_has_the_primarys_recovery_shares(
    consul_server: ConsulServer, tmp_path: Path
) -> None:
    primary = cluster_of(consul_server, tmp_path, "auto-primary", static_seal(tmp_path))
    secondary = cluster_of(consul_server, tmp_path, "plain-secondary", "")
    secondary.nodes.pop()
    try:
        primary.start()
        primary.keys, primary.root_token = init(primary.nodes[0])
        for node in primary.nodes:
            opens(node, (200, 429))
        secondary.bootstrap()
        replicate(primary, secondary)
        secondary.stop()
        secondary.start()
        (node,) = secondary.nodes
        status = seal_status(node)
        assert (status["type"], status["sealed"], status["migration"]) == ("shamir", True, False)
        give(node, "sys/unseal", primary.keys[:2])
        secondary.wait_active()
        wait_in_step(primary, secondary)
    finally:
        primary.kill()
        secondary.kill()

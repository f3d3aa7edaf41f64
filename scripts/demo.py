"""``make demo``: the main job, narrated. One cluster replicates its secrets to another; then things break.

Every line that begins with ``$`` is a command you could type; it is run as printed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hvac  # noqa: E402 - the path above must come first
import hvac.exceptions  # noqa: E402 - the folder above must be importable first

from tests.support.cluster import (  # noqa: E402 - the folder above must be importable first
    Cluster,
    Node,
    call,
    consul_storage,
    embedded_storage,
    in_step,
    performance,
    ready,
)
from tests.support.consul_server import ConsulServer  # noqa: E402 - the folder above must be importable first

BURST = 1000
OUTRIDER = Path(sys.executable).with_name("outrider")
BOLD, DIM, GREEN, RED, PLAIN = "\033[1m", "\033[2m", "\033[32m", "\033[31m", "\033[0m"
if not sys.stdout.isatty():
    BOLD = DIM = GREEN = RED = PLAIN = ""


class DemoError(Exception):
    """A step did not show what it promises."""


class Narrator:
    """Prints numbered steps, runs commands as printed, and keeps the time."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.step = 0

    def title(self, text: str) -> None:
        self.step += 1
        print(f"\n{BOLD}{self.step}. {text}{PLAIN}  {DIM}[{time.monotonic() - self.started:.0f} s]{PLAIN}", flush=True)

    def say(self, text: str) -> None:
        print(f"   {text}", flush=True)

    def good(self, text: str) -> None:
        print(f"   {GREEN}✓{PLAIN} {text}", flush=True)

    def python(self, text: str) -> None:
        print(f"   {DIM}>>> {text}{PLAIN}", flush=True)

    def outrider(
        self, node: Node, *arguments: str, token: str = "", show: bool = True, secret: tuple[str, str] = ("", "")
    ) -> str:
        """Run the command line against ``node``; returns standard output. ``secret`` is (value, name): the printed
        command shows ``$NAME`` for the value, as a user would keep it."""
        shown = " ".join(shlex.quote(argument) for argument in arguments)
        value, name = secret
        if value:
            shown = shown.replace(value, f"${name}")
        print(f"   $ VAULT_ADDR={node.address} outrider {shown}", flush=True)
        environment = {**os.environ, "VAULT_ADDR": node.address, "VAULT_TOKEN": token}
        done = subprocess.run([OUTRIDER, *arguments], env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 2) or (done.returncode == 2 and arguments[0] != "status"):
            raise DemoError(f"outrider {shown} exited with {done.returncode}\n{done.stdout}{done.stderr}")
        if show:
            for line in done.stdout.rstrip().splitlines():
                print(f"     {DIM}{line[:150]}{PLAIN}", flush=True)
        return done.stdout


def expect(condition: bool, what: str) -> None:
    """A step's promise."""
    if not condition:
        raise DemoError(what)


def wait_for(what: str, condition: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    """The first true result of ``condition``."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise DemoError(f"waited {timeout_s:.0f} s in vain: {what}")
        time.sleep(0.02)
    return result


def make_clusters(storage: str, home: Path, consuls: list[ConsulServer]) -> tuple[Cluster, Cluster]:
    """The primary us-east and the secondary eu-west, not started yet."""
    clusters = []
    for region in ("us-east", "eu-west"):
        if storage == "consul":
            server = ConsulServer()
            server.start()
            consuls.append(server)
            stanza, count = consul_storage(server.address, server.token, "outrider/"), 2
        else:
            stanza, count = embedded_storage(home / region / "data"), 1
        names = [f"{region}-{number}" for number in range(1, count + 1)]
        clusters.append(Cluster([Node(name, home / region, stanza, cluster_name=region, warm=False) for name in names]))
    return clusters[0], clusters[1]


def show_status(out: Narrator, primary: Node, secondary: Node) -> None:
    """Both ends' view, in the fields an operator compares."""
    ours, theirs = performance(primary), performance(secondary)
    peer = (ours.get("secondaries") or [{}])[0]
    out.say(
        f"us-east: mode={ours['mode']} state={ours['state']} last_wal={ours['last_wal']} "
        f"last_performance_wal={ours['last_performance_wal']}"
    )
    out.say(
        f"         merkle_root={ours['merkle_root']} secondary {peer.get('node_id')}: {peer.get('connection_status')}"
    )
    out.say(
        f"eu-west: mode={theirs['mode']} state={theirs['state']} last_remote_wal={theirs['last_remote_wal']} "
        f"connection_state={theirs['connection_state']}"
    )
    out.say(f"         merkle_root={theirs['merkle_root']}")


def step_init(out: Narrator, primary: Cluster, secondary: Cluster) -> None:
    out.title("Initialise and unseal both clusters (Shamir, 3 shares of which 2 open), log in with the root token")
    for cluster in (primary, secondary):
        cluster.start()
        first = cluster.nodes[0]
        out.say(f"$ outrider server -config={first.config_path.name}      (and so on: {len(cluster.nodes)} node(s))")
        printed = out.outrider(first, "operator", "init", "-key-shares=3", "-key-threshold=2", show=False)
        lines = dict(line.split(": ", 1) for line in printed.splitlines() if ": " in line)
        cluster.keys = [lines["Unseal Key 1"].strip(), lines["Unseal Key 2"].strip()]
        cluster.root_token = lines["Initial Root Token"].strip()
        for node in cluster.nodes:
            for number, key in enumerate(cluster.keys, 1):
                out.outrider(node, "operator", "unseal", key, show=False, secret=(key, f"KEY_{number}"))
        active = cluster.wait_active()
        for node in cluster.nodes:
            node.wait_until("become active or standby", lambda node=node: ready(node))
        out.good(
            f"{active.name} is active" + (f", {cluster.standby().name} stands by" if len(cluster.nodes) > 1 else "")
        )
        client = hvac.Client(active.address, token=cluster.root_token)
        expect(client.is_authenticated(), "the root token is refused")
    out.good("hvac: client.is_authenticated() is True on both")
    out.say("(from here on VAULT_TOKEN holds the root token of the cluster that VAULT_ADDR names)")


def step_standby(out: Narrator, primary: Cluster) -> None:
    active = primary.wait_active()
    two = len(primary.nodes) > 1
    out.title("A KV v2 secret written on the primary with hvac" + (", read back through its standby" if two else ""))
    out.outrider(active, "secrets", "enable", "-path=secret", "-version=2", "kv", token=primary.root_token)
    writer = hvac.Client(active.address, token=primary.root_token)
    out.python('client.secrets.kv.v2.create_or_update_secret("shop/db", secret={"user": "app", "password": "s3cr3t"})')
    writer.secrets.kv.v2.create_or_update_secret("shop/db", secret={"user": "app", "password": "s3cr3t"})
    reader_node = primary.standby() if two else active
    reader = hvac.Client(reader_node.address, token=primary.root_token)
    found = reader.secrets.kv.v2.read_secret_version("shop/db", raise_on_deleted_version=True)["data"]["data"]
    expect(found == {"user": "app", "password": "s3cr3t"}, "read back something else")
    if two:
        out.good(f"read through the standby {reader_node.name}: forwarded to the active node over mutual TLS")
    else:
        out.say("(reading through a standby needs a second node: make demo STORAGE=consul)")
        out.good("read back")


def step_activate(out: Narrator, primary: Cluster, secondary: Cluster) -> None:
    out.title("Enable replication; the activation token is the only thing carried over")
    active, other = primary.wait_active(), secondary.wait_active()
    out.outrider(active, "auth", "enable", "userpass", token=primary.root_token)
    policy = ROOT / "scripts" / "demo-policy.hcl"
    out.outrider(active, "policy", "write", "shop", str(policy.relative_to(ROOT)), token=primary.root_token)
    out.outrider(
        active, "write", "auth/userpass/users/alice", "password=wonderland", "policies=shop", token=primary.root_token
    )
    out.outrider(active, "write", "-f", "sys/replication/performance/primary/enable", token=primary.root_token)
    wait_for("primary mode", lambda: performance(active).get("mode") == "primary")
    token = out.outrider(
        active,
        "write",
        "-field=wrapping_token",
        "sys/replication/performance/primary/secondary-token",
        "id=eu-west",
        token=primary.root_token,
        show=False,
    ).strip()
    started = time.monotonic()
    out.outrider(
        other,
        "write",
        "sys/replication/performance/secondary/enable",
        f"token={token}",
        token=secondary.root_token,
        secret=(token, "TOKEN"),
    )
    wait_for("the secondary to stream", lambda: in_step(active, secondary.active() or other))
    out.good(f"eu-west holds everything after {time.monotonic() - started:.1f} s")
    secondary.keys = primary.keys


def step_use(out: Narrator, primary: Cluster, secondary: Cluster) -> str:
    out.title("Log in on the secondary through the replicated userpass mount, read, and write")
    node = secondary.wait_active()
    old = call(node.address, "GET", "auth/token/lookup-self", token=secondary.root_token)
    expect(old.status == 403, "the old root token of the secondary still works")
    out.good("the secondary's old root token is gone")
    client = hvac.Client(node.address)
    out.python('client.auth.userpass.login("alice", "wonderland")')
    client.auth.userpass.login("alice", "wonderland")
    found = client.secrets.kv.v2.read_secret_version("shop/db", raise_on_deleted_version=True)["data"]["data"]
    expect(found["user"] == "app", "the secret did not arrive")
    out.good(f"read on the secondary: user={found['user']}")
    client.secrets.kv.v2.create_or_update_secret("shop/region", secret={"written": "in eu-west"})
    here = client.secrets.kv.v2.read_secret_version("shop/region", raise_on_deleted_version=True)["data"]["data"]
    there = hvac.Client(primary.wait_active().address, token=primary.root_token)
    expect(here == {"written": "in eu-west"}, "the write is not readable where it was made")
    expect(
        there.secrets.kv.v2.read_secret_version("shop/region", raise_on_deleted_version=True)["data"]["data"] == here,
        "the write did not reach the primary",
    )
    out.good("a write to the secondary was forwarded to the primary and is readable at once on both")
    if len(secondary.nodes) > 1:
        standby = next(n for n in secondary.nodes if n is not node)
        wait_for("the standby to stand by", lambda: ready(standby))
        through = hvac.Client(standby.address, token=client.token)
        through.secrets.kv.v2.create_or_update_secret("shop/standby", secret={"hops": "standby, active, primary"})
        out.good(f"{standby.name} has the new keys from {node.name}; a write through it: standby → active → primary")
    else:
        out.say("(a standby of the secondary needs a second node: make demo STORAGE=consul)")
    return str(client.token)


def step_status(out: Narrator, primary: Cluster, secondary: Cluster) -> None:
    out.title("Replication status of both")
    ours, theirs = primary.wait_active(), secondary.wait_active()
    wait_for("equal roots", lambda: in_step(ours, theirs))
    out.outrider(ours, "replication", "status", token=primary.root_token)
    show_status(out, ours, theirs)
    out.good("same merkle_root on both, state stream-wals")


def step_reconcile(out: Narrator, primary: Cluster, secondary: Cluster) -> None:
    out.title(f"Stop the secondary, write {BURST:,} secrets on the primary, start it again")
    secondary.stop()
    out.good("the secondary is stopped")
    active = primary.wait_active()
    client = hvac.Client(active.address, token=primary.root_token)
    started = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        list(
            pool.map(
                lambda n: client.secrets.kv.v2.create_or_update_secret(f"burst/{n}", secret={"n": n}), range(BURST)
            )
        )
    out.good(f"{BURST:,} secrets written in {time.monotonic() - started:.1f} s")
    secondary.start()
    secondary.unseal()
    started = time.monotonic()
    node = secondary.wait_active()
    wait_for("equal roots", lambda: in_step(active, node))
    took_s = time.monotonic() - started
    last = performance(node)["last_sync"]
    out.good(
        f"reconciled by {last['by']}: {last['round_trips']} round trip(s), {last['bytes']:,} bytes, "
        f"{last['keys']:,} keys, {last['seconds']:.2f} s (equal roots seen {took_s:.1f} s after it was active)"
    )


def step_kill(out: Narrator, primary: Cluster, secondary: Cluster) -> None:
    two = len(primary.nodes) > 1
    out.title("kill -9 the active node of the primary" + ("; its standby takes over" if two else ""))
    active = primary.wait_active()
    assert active.process is not None
    out.say(f"$ kill -9 {active.process.pid}      # {active.name}")
    started = time.monotonic()
    active.kill()
    if two:
        survivor = next(node for node in primary.nodes if node is not active)
    else:
        out.say(
            "(a standby that takes over needs a second node: make demo STORAGE=consul; here the node is started again)"
        )
        active.start()
        active.unseal(primary.keys)
        survivor = active
    body = {"data": {"after": "the kill"}}

    def writes_again() -> bool:
        try:
            reply = survivor.call("POST", "secret/data/after-kill", body, token=primary.root_token, timeout_s=2)
        except OSError:
            return False
        return reply.status == 200

    wait_for("a write to be accepted again", writes_again)
    out.good(f"writes are accepted again on {survivor.name} {time.monotonic() - started:.2f} s after the kill")
    wait_for("the secondary to follow", lambda: in_step(survivor, secondary.wait_active()))
    out.good("the secondary follows the new active node; roots are equal")
    if two:
        active.start()
        active.unseal(primary.keys)


def step_revoke(out: Narrator, primary: Cluster, secondary: Cluster) -> None:
    out.title("Revoke the secondary")
    active, node = primary.wait_active(), secondary.wait_active()
    started = time.monotonic()
    out.outrider(active, "replication", "revoke", "eu-west", token=primary.root_token)
    wait_for(
        "the secondary to notice",
        lambda: performance(node).get("connection_state", "ready") not in ("ready", "connecting"),
    )
    out.good(f"disconnected after {time.monotonic() - started:.2f} s")
    before = performance(node)["merkle_root"]
    call(
        active.address,
        "POST",
        "secret/data/after-revocation",
        {"data": {"not": "for eu-west"}},
        token=primary.root_token,
    )
    secondary.stop()
    secondary.start()
    secondary.unseal()
    node = secondary.wait_active()
    time.sleep(3)
    status = performance(node)
    expect(status["state"] == "idle" and status["merkle_root"] == before, f"it came back: {status}")
    expect(performance(active)["known_secondaries"] == [], "the primary still knows it")
    out.good(f"restarted, it stays out: state={status['state']}: {status['state_reason']}")


def run(storage: str) -> None:
    """All steps, in order; processes and files are gone afterwards."""
    out = Narrator()
    home = Path(tempfile.mkdtemp(prefix="outrider-demo-"))
    consuls: list[ConsulServer] = []
    clusters: tuple[Cluster, ...] = ()
    failed = True
    try:
        where = "two Consul servers, two nodes each" if storage == "consul" else "embedded storage, one node each"
        print(f"{BOLD}Outrider demo{PLAIN} on {where}")
        clusters = primary, secondary = make_clusters(storage, home, consuls)
        step_init(out, primary, secondary)
        step_standby(out, primary)
        step_activate(out, primary, secondary)
        step_use(out, primary, secondary)
        step_status(out, primary, secondary)
        step_reconcile(out, primary, secondary)
        step_kill(out, primary, secondary)
        step_revoke(out, primary, secondary)
        print(f"\n{GREEN}{BOLD}All {out.step} steps shown in {time.monotonic() - out.started:.0f} s.{PLAIN}")
        failed = False
    except DemoError as error:
        print(f"\n{RED}✗ {error}{PLAIN}\n   logs: {home}", file=sys.stderr)
        sys.exit(1)
    finally:
        for cluster in clusters:
            cluster.kill()
        for server in consuls:
            server.stop()
        if not failed:
            shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Show the main job on two clusters.")
    parser.add_argument("--storage", choices=("embedded", "consul"), default="embedded")
    run(parser.parse_args().storage)

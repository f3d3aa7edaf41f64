"""Role changes, operation tokens and lost writes on the command line: requests made and output."""

from __future__ import annotations

import io
import json

import pytest

from tests.unit.test_cli import envelope, run, server

__all__ = ["run", "server"]  # fixtures


@pytest.mark.parametrize("mode", ["performance", "dr"])
def test_a_primary_is_demoted_and_disabled(server, run, mode):
    base = f"sys/replication/{mode}"
    server.answer("PUT", f"{base}/primary/demote", (200, envelope(warnings=["brief"])))
    server.answer("PUT", f"{base}/primary/disable", (200, envelope(warnings=["brief"])))
    code, _, err = run("replication", "demote", f"-mode={mode}")
    assert (code, "brief" in err) == (0, True)
    assert run("replication", "disable", f"-mode={mode}", "primary")[0] == 0
    assert server.last["body"] == {}


def test_a_dr_secondary_is_promoted_with_its_own_kind_of_token(server, run, monkeypatch):
    base = "sys/replication/dr/secondary"
    data = {"promotion_forecast": {"known_missing_records": 3}}
    server.answer("PUT", f"{base}/promote", (200, envelope(data, warnings=["promoting"])))
    monkeypatch.setattr("sys.stdin", io.StringIO("hvs.typed\n"))
    code, out, _ = run("replication", "promote", "-mode=dr", "-preview", "-format=json")
    assert (code, json.loads(out)["data"]) == (0, data)
    assert server.last["body"] == {"force": False, "preview": True, "dr_operation_token": "hvs.typed"}
    monkeypatch.setenv("OUTRIDER_DR_OPERATION_TOKEN", "hvs.environment")
    run("replication", "promote", "-mode=dr", "-force", "-primary-cluster-addr=https://x:1")
    assert server.last["body"] == {
        "force": True,
        "preview": False,
        "primary_cluster_addr": "https://x:1",
        "dr_operation_token": "hvs.environment",
    }
    server.answer("PUT", f"{base}/disable", (200, envelope(warnings=["brief"])))
    assert run("replication", "disable", "-mode=dr", "secondary")[0] == 0
    assert server.last["body"] == {"dr_operation_token": "hvs.environment"}


def test_a_performance_secondary_needs_none(server, run):
    server.answer("PUT", "sys/replication/performance/secondary/promote", (200, envelope(warnings=["promoting"])))
    assert run("replication", "promote")[0] == 0
    assert server.last["body"] == {"force": False, "preview": False}


def test_update_primary_by_token_by_address_and_blank(server, run):
    server.answer("PUT", "sys/replication/performance/secondary/update-primary", (200, envelope(warnings=["follows"])))
    assert run("replication", "update-primary", "eyJ", "-ca-file=/ca")[0] == 0
    assert server.last["body"] == {"token": "eyJ", "ca_file": "/ca"}
    run("replication", "update-primary", "-addr=https://a:1", "-addr=https://b:1")
    assert server.last["body"] == {"update_primary_addrs": ["https://a:1", "https://b:1"]}
    run("replication", "update-primary", "-forget")
    assert server.last["body"] == {"token": ""}


def test_a_braked_secondary_is_told_how_many_deletions_are_right(server, run, monkeypatch):
    monkeypatch.setenv("OUTRIDER_DR_OPERATION_TOKEN", "hvs.environment")
    server.answer("PUT", "sys/replication/dr/secondary/accept-deletions", (200, envelope(warnings=["anew"])))
    assert run("replication", "accept-deletions", "-mode=dr", "900")[0] == 0
    assert server.last["body"] == {"deletions": 900, "dr_operation_token": "hvs.environment"}
    for wrong in ("0", "-1", "all"):
        assert run("replication", "accept-deletions", "-mode=dr", wrong)[0] == 1


def test_preflight_is_a_table_and_its_exit_code_says_whether_something_failed(server, run):
    path = "sys/replication/performance/secondary/enable"
    failed = {"check": "alpn-path", "result": "failed", "seen": "a TLS-terminating proxy", "action": "layer 4 only"}
    server.answer("PUT", path, (200, envelope({"ready": False, "checks": [failed]})))
    code, out, _ = run("replication", "enable-secondary", "-preflight", "eyJ")
    assert server.last["body"] == {"token": "eyJ", "preflight": True}
    assert (code, "a TLS-terminating proxy" in out, "layer 4 only" in out) == (2, True, True)
    server.answer("PUT", path, (200, envelope({"ready": True, "checks": []})))
    assert run("replication", "enable-secondary", "-preflight", "eyJ")[0] == 0


def test_keys_and_authorities(server, run, monkeypatch):
    server.answer(
        "PUT", "sys/replication/dr/secondary/generate-public-key", (200, envelope({"secondary_public_key": "k"}))
    )
    monkeypatch.delenv("OUTRIDER_DR_OPERATION_TOKEN", raising=False)
    code, out, _ = run("replication", "generate-public-key", "-mode=dr", "-field=secondary_public_key")
    assert (code, out, server.last["body"]) == (0, "k", {})
    monkeypatch.setenv("OUTRIDER_DR_OPERATION_TOKEN", "hvs.op")
    run("replication", "generate-public-key", "-mode=dr")
    assert server.last["body"] == {"dr_operation_token": "hvs.op"}
    server.answer("PUT", "sys/replication/performance/primary/rotate-ca", (200, envelope(warnings=["both count"])))
    code, _, err = run("replication", "rotate-ca", "-overlap=24h")
    assert (code, server.last["body"], "both count" in err) == (0, {"overlap": "24h"}, True)
    run("replication", "rotate-ca", "-force")
    assert server.last["body"] == {"force": True}


def test_lost_writes_are_listed_and_shown(server, run):
    record = {"id": "1-2-ab", "first_wal": 5, "last_wal": 9, "records": 2, "entries": 4, "exact": True, "pages": 1}
    server.answer("GET", "sys/replication/performance/lost-writes", (200, envelope({"lost_writes": [record]})))
    code, out, _ = run("replication", "lost-writes")
    assert (code, "1-2-ab" in out, "first_wal" in out) == (0, True, True)
    entries = {**record, "lost_entries": [{"key": "r/m/a", "wal": 5, "deleted": False, "value": "eA=="}]}
    server.answer("GET", "sys/replication/performance/lost-writes/1-2-ab/export", (200, envelope(entries)))
    assert "eA==" in run("replication", "lost-writes", "-export", "1-2-ab")[1]
    server.answer("GET", "sys/replication/performance/lost-writes", (200, envelope({"lost_writes": []})))
    assert run("replication", "lost-writes")[1] == "No lost writes.\n"


@pytest.mark.parametrize(
    "argv",
    [
        ("replication", "demote", "-mode=both"),
        ("replication", "disable"),
        ("replication", "disable", "everything"),
        ("replication", "promote", "extra"),
    ],
)
def test_usage_errors_reach_no_server(server, run, argv):
    code, _, err = run(*argv)
    assert (code, bool(err)) == (1, True)
    assert server.requests == []


def test_an_operation_token_is_generated_like_a_root_token(server, run):
    base = "sys/replication/dr/secondary/generate-operation-token"
    idle = {"nonce": "", "started": False, "progress": 0, "required": 2, "complete": False, "otp_length": 28}
    started = idle | {"nonce": "n-1", "started": True, "otp": "o" * 28}
    server.answer("PUT", f"{base}/attempt", (200, started))
    code, out, _ = run("operator", "generate-root", "-dr-token", "-init")
    assert (code, "n-1" in out, "o" * 28 in out) == (0, True, True)
    server.answer("GET", f"{base}/attempt", (200, started))
    server.answer("PUT", f"{base}/update", (200, started | {"complete": True, "encoded_token": "abc"}))
    code, out, _ = run("operator", "generate-root", "-dr-token", "share-1")
    assert (code, server.last["body"]) == (0, {"key": "share-1", "nonce": "n-1"})
    assert "abc" in out
    server.answer("DELETE", f"{base}/attempt", (204, None))
    assert run("operator", "generate-root", "-dr-token", "-cancel")[0] == 0

"""``outrider debug``: what the bundle holds, what it does not, and that a failure of one target spoils no other."""

from __future__ import annotations

import json
import tarfile
import threading

import pytest

from sidecar.cli import client as cli_client
from sidecar.cli import debug
from tests.unit.test_cli import envelope, run, server

__all__ = ["run", "server"]  # fixtures


@pytest.fixture
def node(server, monkeypatch, tmp_path):
    """A server that answers to every target."""
    monkeypatch.chdir(tmp_path)
    server.answer("GET", "sys/config/state/sanitized", (200, envelope({"api_addr": "x"}) | {"request_id": "r"}))
    server.answer("GET", "sys/host-info", (200, envelope({"cpu": []}) | {"request_id": "r"}))
    server.answer("GET", "sys/metrics", (200, {"Gauges": []}))
    server.answer("GET", "sys/replication/status", (200, envelope({"dr": {}}) | {"request_id": "r"}))
    server.answer("GET", "sys/in-flight-req", (200, {"1": {"request_path": "/v1/x"}}))
    server.answer("GET", "sys/health", (200, {"initialized": True}))
    server.answer("GET", "sys/seal-status", (200, {"sealed": False}))
    server.answer("GET", "sys/leader", (200, {"ha_enabled": True}))
    server.answer("GET", "sys/ha-status", (200, envelope({"nodes": []}) | {"request_id": "r"}))
    for name in ("goroutine", "threadcreate", "heap", "profile"):
        server.answer("GET", f"sys/pprof/{name}", (200, {"profile": name}))
    server.answer("GET", "sys/monitor", (200, {"line": "one"}))
    return server


def test_one_capture_of_everything(node, run, tmp_path):
    code, out, _ = run("debug", "-duration=0", "-compress=false", "-output=b")
    assert (code, out) == (0, "Success! Bundle written to: b\n")
    folder = tmp_path / "b"
    index = json.loads((folder / "index.json").read_text())
    assert index["targets"] == list(debug.TARGETS)
    assert index["errors"] == []
    (config,) = json.loads((folder / "config.json").read_text())
    assert config["config"] == {"api_addr": "x"}
    status = json.loads((folder / "server_status.json").read_text())
    assert [next(name for name in one if name != "timestamp") for one in status] == ["health", "seal", "leader", "ha"]
    assert json.loads((folder / "requests.json").read_text())[0]["requests"]["1"]["request_path"] == "/v1/x"
    profiles = [name for name in index["output"] if name.endswith("/goroutine.txt")]
    assert len(profiles) == 1
    assert not [name for name in index["output"] if name.endswith("/profile.txt")], "no time to sample in"
    for path in folder.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_captures_over_time_in_one_archive(node, run, tmp_path):
    code, out, _ = run("debug", "-duration=2s", "-interval=1s", "-metrics-interval=1s", "-target=metrics,pprof,host")
    assert code == 0
    (made,) = tmp_path.glob("outrider-debug-*.tar.gz")
    assert out.endswith(f"{made.name}\n")
    assert list(tmp_path.iterdir()) == [made], "the folder is gone"
    with tarfile.open(made) as archive:
        names = archive.getnames()
        root = made.name.removesuffix(".tar.gz")
        metrics = json.load(archive.extractfile(f"{root}/metrics.json"))
    assert len(metrics) >= 2
    assert f"{root}/host_info.json" in names
    assert not any("config" in name or "server.log" in name for name in names)
    assert [name for name in names if name.endswith("/profile.txt")]


def test_what_cannot_be_captured_is_named_and_the_rest_is_there(node, run, tmp_path):
    node.answer("GET", "sys/host-info", (403, {"errors": ["permission denied"]}))
    node.answer("GET", "sys/pprof/heap", (400, {"errors": ["memory is not traced"]}))
    code, _, err = run("debug", "-duration=0", "-compress=false", "-output=b")
    assert code == 0
    index = json.loads((tmp_path / "b" / "index.json").read_text())
    assert {(one["target"], one["error"].rpartition("* ")[2]) for one in index["errors"]} == {
        ("host", "permission denied"),
        ("pprof", "memory is not traced"),
    }
    assert "WARNING! host: " in err
    assert (tmp_path / "b" / "replication_status.json").exists()


def test_nothing_that_looks_like_a_token_is_written(node, run, tmp_path, monkeypatch):
    for token in ("t0ken-of-mine", "hvs.CAESIabcdefgh12345678", "s.abcdefghijklmnopqrstuvwx"):
        monkeypatch.setenv("VAULT_TOKEN", "t0ken-of-mine")
        node.answer("GET", "sys/metrics", (200, {"Gauges": [token]}))
        node.answer("GET", "sys/pprof/goroutine", (200, {"stack": token}))
        node.answer("GET", "sys/host-info", (500, {"errors": [f"no {token} here"]}))
        run("debug", "-duration=0", "-compress=false", f"-output={token[:3]}")
        folder = tmp_path / token[:3]
        text = "".join(path.read_text() for path in folder.rglob("*") if path.is_file())
        assert token not in text
        assert text.count(debug.REDACTED) >= 3


def test_an_interrupted_capture_keeps_what_there_is(node, run, tmp_path, monkeypatch):
    monkeypatch.setattr(debug.time, "sleep", lambda _s: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, err = run("debug", "-duration=1h", "-compress=false", "-output=b", "-target=config")
    assert (code, "Interrupted" in err) == (0, True)
    assert json.loads((tmp_path / "b" / "index.json").read_text())["output"] == ["config.json"]


def test_the_log_is_followed_meanwhile(node, run, tmp_path, monkeypatch):
    followed = threading.Event()

    def stream(self, path, query):
        yield "first line\n"
        yield "hvs.CAESIabcdefgh12345678\n"
        followed.set()

    monkeypatch.setattr(cli_client.Client, "stream", stream)
    monkeypatch.setattr(debug.time, "sleep", lambda _s: followed.wait(120))
    run("debug", "-duration=1s", "-compress=false", "-output=b", "-target=log")
    assert (tmp_path / "b" / "server.log").read_text() == f"first line\n{debug.REDACTED}\n"


@pytest.mark.parametrize(
    "flag",
    ["-target=none", "-interval=0.1s", "-metrics-interval=0", "-duration=long", "-output=there", "-output-policy"],
)
def test_calls_that_are_refused(node, run, tmp_path, flag):
    (tmp_path / "there").mkdir()
    assert run("debug", "-duration=0", flag)[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]

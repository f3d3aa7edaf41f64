"""The server's configuration: Vault's stanzas, typed, total, and with the place of every mistake."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar import config
from sidecar.app import store_options
from sidecar.config import (
    AuditSettings,
    ConfigError,
    ConsulStorage,
    DevOptions,
    ElectionSettings,
    EmbeddedStorage,
    ForwardedForSettings,
    InmemStorage,
    LockoutStanza,
    ProxyProtocolSettings,
    ReplicationSettings,
    SealSettings,
    ServerConfig,
    TransitSealSettings,
    UnixListener,
    load,
    load_dev,
    load_text,
)
from sidecar.config.reader import parse_duration_s

MINIMAL = 'storage "inmem" {}\nlistener "tcp" { tls_disable = true }\n'

VAULT_FILE = """
ui            = true
disable_mlock = true
cluster_name  = "us-east"
api_addr      = "https://10.0.0.7:8200"
cluster_addr  = "https://10.0.0.7:8201"
default_lease_ttl = "1h"
max_lease_ttl     = 7200
log_level = "Warning"
log_format = "json"

storage "consul" {
  address = "127.0.0.1:8500"
  path    = "vault/us"
  scheme  = "https"
  token   = "s3cret"
  service = "vault"
  service_tags = "a, b"
  check_timeout = "7s"
  session_ttl = "15s"
  tls_ca_file = "/ca.pem" tls_skip_verify = 0
}

listener "tcp" {
  address         = "0.0.0.0:8200"
  cluster_address = "10.0.0.7:8201"
  tls_cert_file   = "/c.pem"
  tls_key_file    = "/k.pem"
  tls_min_version = "tls13"
  max_request_size = "1MiB"
  x_forwarded_for_authorized_addrs = ["10.0.0.0/8"]
  telemetry { unauthenticated_metrics_access = true }
}

telemetry { prometheus_retention_time = "24h" }
seal "shamir" {}
replication {
  best_effort_wal_wait_duration = "500ms"
  promotion_lag_max = "5m"
  allow_forwarding_via_header = true
  logshipper_buffer_length = 100
  resolver_discover_servers = true
}
sidecar { beat_ttl = "2s" beat_interval = "500ms" lock_delay = 0.25 wal_keep_records = 1000 wal_keep_size = "64MiB" }
"""


def test_a_vault_file_loads_with_warnings_only():
    loaded = load_text(VAULT_FILE, "v.hcl")
    assert isinstance(loaded.storage, ConsulStorage)
    assert loaded.storage.path == "vault/us/"
    assert loaded.storage.connection.explicit() == {
        "address": "127.0.0.1:8500",
        "scheme": "https",
        "token": "s3cret",
        "ca_file": "/ca.pem",
        "tls_skip_verify": "false",
    }
    (listener,) = loaded.listeners
    assert (listener.address, listener.cluster_address) == ("0.0.0.0:8200", "10.0.0.7:8201")
    assert (listener.tls_min_version, listener.max_request_size_bytes) == ("tls13", 1048576)
    assert (loaded.api_addr, loaded.cluster_addr) == ("https://10.0.0.7:8200", "https://10.0.0.7:8201")
    assert (loaded.default_lease_ttl_s, loaded.max_lease_ttl_s) == (3600, 7200)
    assert (loaded.log_level, loaded.log_format, loaded.cluster_name) == ("warn", "json", "us-east")
    registration = loaded.service_registration
    assert (registration.disable, registration.service, registration.tags) == (False, "vault", ("a", "b"))
    assert (registration.check_timeout_s, registration.connection) == (7.0, None)
    assert loaded.replication == ReplicationSettings(
        0.5, 5.0, promotion_lag_max_s=300.0, allow_forwarding_via_header=True
    )
    assert (loaded.lock_memory, load_text(MINIMAL).lock_memory) == (False, True)
    assert listener.forwarded_for == ForwardedForSettings(("10.0.0.0/8",))
    assert (listener.unauthenticated_metrics_access, loaded.telemetry.prometheus_retention_s) == (True, 86400.0)
    assert loaded.election == ElectionSettings(2.0, 0.5, 0.25, 10.0)
    assert (loaded.store.wal_keep_records, loaded.store.wal_keep_bytes) == (1000, 64 * 2**20)
    assert sorted(warning.partition('"')[2].partition('"')[0] for warning in loaded.warnings) == [
        "logshipper_buffer_length", "resolver_discover_servers", "session_ttl",
        "ui",
    ]  # fmt: skip
    assert all(warning.startswith("v.hcl:") for warning in loaded.warnings)
    assert "s3cret" not in repr(loaded)


def test_the_json_form_is_the_same():
    document = {
        "storage": {"embedded": {"path": "/data"}},
        "listener": [{"tcp": {"address": "127.0.0.1:1", "tls_disable": "true"}}],
        "replication": {"heartbeat_interval": 1},
        "max_lease_ttl": "800h",
        "ui": False,
    }
    text = """storage "embedded" { path = "/data" }
      listener "tcp" { address = "127.0.0.1:1" tls_disable = 1 }
      replication { heartbeat_interval = "1s" }
      max_lease_ttl = "800h" """
    assert replace(load_text(json.dumps(document)), warnings=()) == load_text(text)
    assert load_text(text).storage == EmbeddedStorage("/data")


def test_the_staging_of_a_sync_is_configured_and_the_store_takes_twice_as_much():
    loaded = load_text(MINIMAL + 'replication { secondary_certificate_ttl = "720h" certificate_check_interval = "5s" }')
    assert loaded.replication == ReplicationSettings(
        secondary_certificate_ttl_s=720 * 3600.0, certificate_check_interval_s=5.0
    )
    loaded = load_text(MINIMAL + 'replication { sync_staging_size = "512MiB" sync_staging_entries = 900000 }')
    assert loaded.replication == ReplicationSettings(sync_staging_bytes=512 * 2**20, sync_staging_entries=900_000)
    braking = load_text(MINIMAL + "replication { unasked_deletions = 5 unasked_deletions_percent = 0 }")
    assert braking.replication == ReplicationSettings(unasked_deletions=5, unasked_deletions_percent=0)
    with pytest.raises(ConfigError, match="0 to 100"):
        load_text(MINIMAL + "replication { unasked_deletions_percent = 101 }")
    options = store_options(loaded)
    assert (options.staged_bytes_max, options.staged_entries_max) == (1024 * 2**20, 1_800_000)
    usual = store_options(load_text(MINIMAL))
    assert (usual.staged_bytes_max, usual.staged_entries_max) == (256 * 2**20, 1_000_000)


def test_assigned_objects_are_blocks_as_in_hcl_1():
    loaded = load_text("storage = { inmem = {} }\nlistener = [{ tcp = { tls_disable = true } }]")
    assert loaded.storage == InmemStorage()
    assert loaded.listeners[0].address == "127.0.0.1:8200"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('storage "consul" {\n adress = 1 }', 'f:2: unknown key "adress" in storage "consul"; did you mean "address"?'),
        ('storge "inmem" {}', 'f:1: unknown key "storge"; did you mean "storage"?'),
        (MINIMAL + "xyzzy = 1", 'f:3: unknown key "xyzzy"'),
        ('listener "tcp" { tls_disable = true telemtry {} }', 'unknown key "telemtry" in listener "tcp"; did you mean'),
        ("", "no storage is configured"),
        ('storage "inmem" {}', "no listener is configured"),
        ('storage "raft" {}', 'f:1: storage "raft" is not available'),
        ("storage {}", 'f:1: expected storage "type" {...}'),
        ('storage "embedded" {}', 'f:1: storage "embedded" needs "path"'),
        ('storage = "consul"', 'f:1: "storage" must be a block in braces'),
        ('storage "inmem" {}\nstorage "inmem" {}', 'f:2: "storage" is given twice; first on line 1'),
        ('storage "inmem" {}\nbackend "inmem" {}', 'f:2: "backend" is the old name of "storage"'),
        ('storage "consul" { path = "a//b" }', 'f:1: "path" in storage "consul" must be a key prefix'),
        ('storage "consul" { token = 5 }', 'f:1: "token" in storage "consul" must be text in quotes'),
        ('storage "consul" { scheme = "ftp" }', 'must be one of http, https'),
        ('storage "consul" { tls_skip_verify = "maybe" }', "must be true or false"),
        ('storage "consul" { service_meta { a = 1 } }', "must be an object of texts"),
        ('storage "consul" { check_timeout = "0s" }', "must be at least 1 seconds"),
        ('listener "udp" {}', 'f:1: listener "udp" is not available; there are "tcp" and "unix"'),
        ('listener "unix" {}', 'a listener "unix" needs a listener "tcp" beside it'),
        (MINIMAL + 'listener "unix" { socket_mode = "rw" }', '"socket_mode" in listener "unix" must be an octal mode'),
        (MINIMAL + 'listener "unix" { address = "s.sock" }', "must be an absolute path"),
        (MINIMAL + 'listener "unix" {}\nlistener "unix" {}', "two listeners have the same address"),
        ('listener "tcp" {}', 'f:1: listener "tcp" needs "tls_cert_file" (or "tls_disable = true")'),
        ('listener "tcp" { tls_disable = 1 address = "a:b:c" }', 'f:1: "address" in listener "tcp" must be host:port'),
        ('listener "tcp" { tls_disable = 1 address = "{{ GetPrivateIP }}:1" }', "must be host:port"),
        ('listener "tcp" { tls_disable = 1 tls_min_version = "tls9" }', "must be one of tls12, tls13"),
        ('listener "tcp" { tls_disable = 1 proxy_protocol_behavior = "sometimes" }', "must be one of use_always"),
        (
            'listener "tcp" { tls_disable = 1 proxy_protocol_behavior = "deny_unauthorized" }',
            'needs "proxy_protocol_authorized_addrs"',
        ),
        (
            'listener "tcp" { tls_disable = 1 proxy_protocol_authorized_addrs = "10.0.0.0/8" }',
            'needs "proxy_protocol_behavior" beside it',
        ),
        (
            'listener "tcp" { tls_disable = 1 proxy_protocol_behavior = "use_always" '
            'proxy_protocol_authorized_addrs = "h" }',
            "must hold addresses and networks only",
        ),
        (
            'listener "tcp" { tls_disable = 1 tls_min_version = "tls13" tls_max_version = "tls12" }',
            "is below tls_min_version",
        ),
        ('listener "tcp" { tls_disable = 1 max_request_size = "big" }', "must be a number of bytes"),
        ('listener tcp { tls_disable = 1 }\nlistener tcp { tls_disable = 1 }', "two listeners have the same address"),
        ('seal "awskms" {}', 'f:1: seal "awskms" is not available; there are "shamir", "static" and "transit"'),
        ('seal {}', 'f:1: expected seal "type"'),
        ('seal "static" { current_key = "k" }', 'f:1: seal "static" needs "current_key_id"'),
        ('seal "static" { current_key_id = "k" current_key = "k" previous_key = "p" }', "together"),
        (
            'seal "static" { current_key_id = "k" current_key = "k" previous_key = "p" previous_key_id = "k" }',
            "another key has another name",
        ),
        ('seal "static" { current_key_id = "k" current_key = "k" curent = "" }', 'did you mean "current_key"'),
        ('seal "transit" { address = "http://h:1" token = "t" key_name = "k" }', 'needs "mount_path" or the variable'),
        (
            'seal "transit" { address = "h:1" token = "t" key_name = "k" mount_path = "m" }',
            '"address" in seal "transit" must be http',
        ),
        (
            'seal "transit" { address = "http://h:1" token = "t" key_name = "a/b" mount_path = "m" }',
            "is not the name of a transit key",
        ),
        (
            'seal "static" { current_key_id = "k" current_key = "k" }\nseal "shamir" {}',
            'f:2: a second seal; say disabled = "true"',
        ),
        ('seal "static" { current_key_id = "k" current_key = "k" priority = 1 }', "one seal at a time"),
        (MINIMAL + 'default_lease_ttl = "800h"', 'f:3: "default_lease_ttl" leaves default_lease_ttl'),
        (MINIMAL + "default_lease_ttl = true", "must be a duration"),
        (MINIMAL + 'log_level = "loud"', 'f:3: "log_level" must be one of trace'),
        (MINIMAL + "log_level {}", 'f:3: "log_level" is a setting, not a block'),
        (MINIMAL + "sidecar { wal_keep_records = 1.5 }", "must be a whole number"),
        (MINIMAL + 'replication { allow_forwarding_via_token = "new_token" }', "is not available"),
        (MINIMAL + 'sidecar { beat_ttl = "1s" }', 'f:3: "beat_ttl" in sidecar leaves no room for one lost beat'),
        (MINIMAL + "disable_clustering = true", "is not available"),
        (MINIMAL + 'api_addr = "10.0.0.7:8200"', "api_addr must be http://host:port"),
        (MINIMAL + 'api_addr = "http://h:99999"', "api_addr must be http://host:port"),
        (MINIMAL + 'api_addr = "http://h/x"', "without a path"),
        (MINIMAL + 'cluster_addr = "https://h"', "cluster_addr must name a port"),
        (MINIMAL + 'cluster_addr = "http://h:1"', "cluster_addr must be https://host:port"),
        ('storage "consul" {}\nlistener "tcp" { address = ":8200" tls_disable = 1 }', "api_addr is needed"),
        (MINIMAL + 'x = "', "f:3:5: string is not closed"),
    ],
)  # fmt: skip
def test_mistakes(text, message):
    if "storage" not in text and "storge" not in text and text:
        text = f'{text}\nstorage "inmem" {{}}'
    with pytest.raises(ConfigError) as caught:
        load_text(text, "f")
    assert message in str(caught.value)


def test_an_error_never_repeats_a_value():
    for line in ("scheme", "path", "check_timeout", "tls_skip_verify", "service_meta", "disable_registration"):
        with pytest.raises(ConfigError) as caught:
            load_text(f'storage "consul" {{ {line} = "//s3cret//x" }}')
        assert "s3cret" not in str(caught.value)


def test_addresses_are_made_from_the_first_listener():
    def addresses(listener: str, storage: str = '"inmem" {}') -> tuple[str, str]:
        loaded = load_text(f'storage {storage}\nlistener "tcp" {{ tls_disable = true {listener} }}')
        return loaded.api_addr, loaded.cluster_addr

    assert addresses("") == ("http://127.0.0.1:8200", "https://127.0.0.1:8201")
    assert addresses('address = "[::1]:9000"') == ("http://[::1]:9000", "https://[::1]:9001")
    assert addresses('address = "0.0.0.0:9000"') == ("http://127.0.0.1:9000", "https://127.0.0.1:9001")
    assert addresses('address = "node1"') == ("http://node1:8200", "https://node1:8201")
    assert addresses('cluster_address = "10.0.0.1:7"', '"consul" {}') == (
        "http://127.0.0.1:8200",
        "https://127.0.0.1:7",
    )
    assert addresses('address = "127.0.0.1:0"') == ("http://127.0.0.1:0", "https://127.0.0.1:0")


def test_a_registration_of_its_own_connection():
    loaded = load_text(
        'storage "consul" { service = "a" }\nlistener "tcp" { tls_disable = 1 }\n'
        'service_registration "consul" { service = "b" address = "c:1" service_meta = { k = "v" } '
        "disable_registration = 1 }"
    )
    registration = loaded.service_registration
    assert (registration.service, registration.disable, registration.meta) == ("b", True, {"k": "v"})
    assert registration.connection is not None
    assert registration.connection.address == "c:1"
    assert load_text(MINIMAL).service_registration.disable


def test_environment_wins_over_files_and_outrider_over_vault():
    text = MINIMAL + 'api_addr = "http://file:1"\nlog_level = "info"'
    environ = {"VAULT_API_ADDR": "http://vault:1", "VAULT_LOG_LEVEL": "debug"}
    assert load_text(text).api_addr == "http://file:1"
    loaded = load_text(text, environ=environ)
    assert (loaded.api_addr, loaded.log_level) == ("http://vault:1", "debug")
    loaded = load_text(text, environ={**environ, "OUTRIDER_API_ADDR": "http://own:1", "OUTRIDER_LOG_LEVEL": "err"})
    assert (loaded.api_addr, loaded.log_level) == ("http://own:1", "error")
    with pytest.raises(ConfigError, match="environment LOG_FORMAT"):
        load_text(text, environ={"VAULT_LOG_FORMAT": "xml"})


def test_several_files_and_directories(tmp_path):
    (tmp_path / "a.hcl").write_text(MINIMAL + 'cluster_name = "one"')
    (tmp_path / "b.json").write_text('{"cluster_name": "two", "storage": {"embedded": {"path": "/d"}}}')
    (tmp_path / "notes.txt").write_text("not read")
    extra = tmp_path / "sub"
    extra.mkdir()
    (extra / "more.hcl").write_text('listener "tcp" { address = "127.0.0.1:1" tls_disable = true }')
    loaded = load([str(tmp_path), str(extra / "more.hcl")], {})
    assert (loaded.cluster_name, loaded.storage, len(loaded.listeners)) == ("two", EmbeddedStorage("/d"), 2)
    (tmp_path / "b.json").write_text('{"zzz": 1}')
    with pytest.raises(ConfigError, match=r"b\.json:1: unknown key"):
        load([str(tmp_path)], {})


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load([str(tmp_path / "none.hcl")], {})
    with pytest.raises(ConfigError, match=r"holds no \.hcl or \.json"):
        load([str(tmp_path)], {})
    (tmp_path / "x.hcl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load([str(tmp_path / "x.hcl")], {})


def test_dev_needs_no_file_and_takes_what_a_file_adds(tmp_path):
    loaded = load_dev(DevOptions(listen_address="127.0.0.1:9999", root_token_id="s3cret"), environ={})
    assert loaded.storage == InmemStorage()
    (listener,) = loaded.listeners
    assert (listener.address, listener.cluster_address) == ("127.0.0.1:9999", "127.0.0.1:10000")
    assert listener.tls_disable
    assert loaded.api_addr == "http://127.0.0.1:9999"
    assert "s3cret" not in repr(DevOptions(root_token_id="s3cret"))
    (tmp_path / "c.hcl").write_text('cluster_name = "c"')
    assert load_dev(DevOptions(), [str(tmp_path / "c.hcl")], {}).cluster_name == "c"
    with pytest.raises(ConfigError, match="-dev-listen-address"):
        load_dev(DevOptions(listen_address="a b"), environ={})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("1.5", 1.5),
        ("768h", 2764800),
        ("1h30m5s", 5405),
        ("500ms", 0.5),
        ("2d", 172800),
        (" 1m", 60),
    ],
)
def test_durations(text, seconds):
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "-1s", "1 h", "h", "1x", "1h3", "1e3", "9" * 30, "\u0661s", "nan", "9999999999h"])
def test_no_durations(text):
    with pytest.raises(ValueError, match="duration"):
        parse_duration_s(text)


pieces = st.sampled_from(
    ['storage "inmem" {}', 'listener "tcp" {', "}", "tls_disable = true", 'storage "consul" {', "address = 1",
     "replication {", "sidecar {", "=", "[", "]", "{", '"x"', "api_addr", "service_meta", "telemetry", "\n", "seal",
     "listener", "max_lease_ttl = ", '"1h"', "-1", "path", 'service_registration "consul" {', "default_lease_ttl = 5"]
)  # fmt: skip


@given(st.lists(pieces, max_size=20).map(" ".join))
def test_any_file_loads_or_raises_config_error(text):
    with contextlib.suppress(ConfigError):
        assert isinstance(load_text(text), ServerConfig)


def test_what_audit_devices_may_do_is_configured_here_alone():
    assert load_text(MINIMAL).audit == AuditSettings()
    loaded = load_text(
        MINIMAL
        + 'allow_audit_log_prefixing = true\nsidecar { audit_directories = ["/var/log/outrider"] audit_timeout = "5s" }'
    )
    assert loaded.audit == AuditSettings(True, ("/var/log/outrider",), 5.0)
    assert load_text(MINIMAL + "allow_audit_log_prefixing = true").audit == AuditSettings(True)
    with pytest.raises(ConfigError, match="absolute"):
        load_text(MINIMAL + 'sidecar { audit_directories = ["logs"] }')


def test_every_exported_name_exists():
    assert all(hasattr(config, name) for name in config.__all__)


@pytest.mark.parametrize("word", ["storage", "backend"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("inmem", InmemStorage()),
        ("inmem_ha", InmemStorage()),
        ('file" { path = "/data', EmbeddedStorage("/data")),
        ('embedded" { path = "/data', EmbeddedStorage("/data")),
    ],
)
def test_storages_of_vault_that_are_kept_here_otherwise(word: str, kind: str, expected: object):
    stanza = f'{word} "{kind}" }}' if "{" in kind else f'{word} "{kind}" {{}}'
    loaded = load_text(f'{stanza}\nlistener "tcp" {{ tls_disable = true }}', "v.hcl")
    assert loaded.storage == expected
    assert bool(loaded.warnings) == kind.startswith("file")
    assert all("embedded store" in warning for warning in loaded.warnings)


def test_a_tls_version_that_nobody_should_speak_is_raised_with_a_warning():
    listener = 'listener "tcp" { tls_cert_file = "c" tls_key_file = "k" tls_min_version = "tls10" }'
    loaded = load_text('storage "inmem" {}\n' + listener)
    assert loaded.listeners[0].tls_min_version == "tls12"
    assert "too old" in loaded.warnings[0]


LOCKOUT = """
user_lockout "all" {
  lockout_duration = "10m"
  lockout_counter_reset = "10m"
}
user_lockout "userpass" {
  lockout_threshold = "25"
  lockout_duration = "5m"
}
user_lockout "ldap" {
  disable_lockout = "true"
}
"""


def test_user_lockout() -> None:
    found = load_text(MINIMAL + LOCKOUT).user_lockout
    assert found == {
        "all": LockoutStanza(duration_s=600, counter_reset_s=600),
        "userpass": LockoutStanza(threshold=25, duration_s=300),
        "ldap": LockoutStanza(disable=True),
    }
    assert load_text(MINIMAL).user_lockout == {}
    for stanza, text in (
        ('user_lockout "github" {}', "expected user_lockout"),
        ("user_lockout {}", "expected user_lockout"),
        ('user_lockout "all" {}\nuser_lockout "all" {}', "two stanzas"),
        ('user_lockout "all" { lockout_treshold = 2 }', "lockout_threshold"),
        ('user_lockout "all" { lockout_threshold = "many" }', "whole number"),
    ):
        with pytest.raises(ConfigError, match=text):
            load_text(MINIMAL + stanza)


def test_the_environment_turns_lockouts_off() -> None:
    for name in ("VAULT_DISABLE_USER_LOCKOUT", "OUTRIDER_DISABLE_USER_LOCKOUT"):
        assert load_text(MINIMAL, environ={name: "true"}).disable_user_lockout
        assert not load_text(MINIMAL, environ={name: "0"}).disable_user_lockout
        with pytest.raises(ConfigError, match="DISABLE_USER_LOCKOUT"):
            load_text(MINIMAL, environ={name: "perhaps"})
    assert not load_text(MINIMAL).disable_user_lockout


TRANSIT = """
seal "transit" { address = "https://other:8200/" token = "hvs.secret" key_name = "unseal" mount_path = "/transit/"
  namespace = "ns1/" disable_renewal = "true" tls_ca_cert = "/ca.pem" tls_server_name = "other" }
"""


def test_transit_seal_with_its_environment():
    seal = load_text(MINIMAL + TRANSIT).seal
    assert (seal.kind, seal.disabled) == ("transit", ())
    assert seal.seal == TransitSealSettings(
        address="https://other:8200",
        token="hvs.secret",
        key_name="unseal",
        mount_path="transit",
        namespace="ns1/",
        disable_renewal=True,
        tls_ca_cert="/ca.pem",
        tls_server_name="other",
    )
    assert "hvs.secret" not in repr(seal)
    environ = {
        "VAULT_TOKEN": "hvs.environment",
        "VAULT_TRANSIT_SEAL_KEY_NAME": "other",
        "VAULT_TRANSIT_SEAL_DISABLE_RENEWAL": "false",
    }
    loaded = load_text(MINIMAL + TRANSIT, "f", environ)
    assert isinstance(loaded.seal.seal, TransitSealSettings)
    assert (loaded.seal.seal.token, loaded.seal.seal.key_name) == ("hvs.environment", "other")
    assert loaded.seal.seal.disable_renewal is False
    assert any(
        '"token" in seal "transit" gives way to the environment variable VAULT_TOKEN' in w for w in loaded.warnings
    )
    assert not any("hvs." in warning for warning in loaded.warnings)
    only = {"VAULT_SEAL_TYPE": "transit", "VAULT_ADDR": "http://h:1", "VAULT_TOKEN": "t"}
    with pytest.raises(ConfigError, match=r"environment SEAL_TYPE: .*key_name"):
        load_text(MINIMAL, "f", only)
    more = {**only, "VAULT_TRANSIT_SEAL_KEY_NAME": "k", "VAULT_TRANSIT_SEAL_MOUNT_PATH": "transit"}
    assert load_text(MINIMAL, "f", more).seal.kind == "transit"


def test_a_disabled_seal_needs_nothing_and_opens_nothing():
    text = (
        'seal "transit" { disabled = "true" address = "x" }\nseal "static" { current_key_id = "k" current_key = "s" }'
    )
    seal = load_text(MINIMAL + text).seal
    assert (seal.kind, seal.disabled) == ("static", ("transit",))
    assert load_text(MINIMAL + 'seal "static" { disabled = "true" }').seal == SealSettings(None, ("static",))
    assert load_text(MINIMAL).seal == SealSettings()


def test_dev_has_no_auto_seal(tmp_path):
    (tmp_path / "seal.hcl").write_text('seal "static" { current_key_id = "k" current_key = "s" }')
    with pytest.raises(ConfigError, match="-dev has one unseal key"):
        load_dev(DevOptions(), [str(tmp_path / "seal.hcl")], {})


def test_listeners_of_every_kind():
    text = (
        'storage "inmem" {}\n'
        'listener "tcp" { tls_disable = true proxy_protocol_behavior = "allow_authorized" '
        'proxy_protocol_authorized_addrs = ["10.0.0.1", "10.1.0.0/16"] http_read_timeout = "20s" http_idle_timeout = 0 '
        "max_request_size = 0 }\n"
        'listener "tcp" { address = "127.0.0.1:9200" tls_disable = true }\n'
        'listener "unix" { address = "/run/o.sock" socket_mode = "0660" socket_user = "vault" socket_group = "1000" '
        'require_request_header = true max_request_duration = "5s" }\n'
    )
    loaded = load_text(text)
    first, second = loaded.listeners
    assert first.proxy_protocol == ProxyProtocolSettings("allow_authorized", ("10.0.0.1", "10.1.0.0/16"))
    assert (first.http_read_timeout_s, first.http_idle_timeout_s, first.max_request_size_bytes) == (20, 0, 33554432)
    assert (second.address, second.cluster_address, second.proxy_protocol) == ("127.0.0.1:9200", "127.0.0.1:9201", None)
    assert second.http_read_header_timeout_s == 10
    (unix,) = loaded.unix_listeners
    assert unix == UnixListener(
        "/run/o.sock", 0o660, "vault", "1000", require_request_header=True, max_request_duration_s=5
    )
    assert loaded.api_addr == "http://127.0.0.1:8200"
    always = load_text(MINIMAL.replace("tls_disable", 'proxy_protocol_behavior = "use_always" tls_disable'))
    assert any("everybody who can connect may claim any address" in warning for warning in always.warnings)

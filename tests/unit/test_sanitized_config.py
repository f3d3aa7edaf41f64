"""What sys/config/state/sanitized shows of a configuration, and what not."""

import json

from sidecar.config import load_text
from sidecar.sanitized_config import sanitized

CONFIG = """
storage "consul" {
  token   = "s3cret-storage"
  path    = "vault/"
}
service_registration "consul" { token = "s3cret-registration" }
seal "transit" {
  address    = "https://other:8200"
  token      = "s3cret-seal"
  key_name   = "k"
  mount_path = "transit/"
}
seal "static" {
  disabled       = true
  current_key_id = "k1"
  current_key    = "s3cret-key"
}
listener "tcp" {
  address       = "10.0.0.7:8200"
  tls_cert_file = "/c.pem"
  tls_key_file  = "/k.pem"
}
listener "tcp" {
  address     = "127.0.0.1:8300"
  tls_disable = true
}
listener "unix" { address = "/run/o.sock" }
log_file            = "/log/"
log_rotate_duration = "12h"
pid_file            = "/run/o.pid"
telemetry { usage_gauge_period = "5m" }
"""


def test_what_is_in_force_is_shown_under_vaults_names() -> None:
    shown = sanitized(load_text(CONFIG))
    assert shown["storage"]["type"] == "consul"
    assert shown["service_registration"] == {"type": "consul"}
    assert shown["seals"] == [{"type": "static", "disabled": True}, {"type": "transit", "disabled": False}]
    assert [(one["type"], one["config"]["address"]) for one in shown["listeners"]] == [
        ("tcp", "10.0.0.7:8200"),
        ("tcp", "127.0.0.1:8300"),
        ("unix", "/run/o.sock"),
    ]
    assert shown["listeners"][0]["config"]["tls_cert_file"] == "/c.pem"
    assert shown["listeners"][1]["config"]["tls_disable"] is True
    assert (shown["log_file"], shown["log_rotate_duration"], shown["pid_file"]) == ("/log/", "43200s", "/run/o.pid")
    assert shown["telemetry"]["usage_gauge_period"] == 300 * 10**9
    assert (shown["disable_mlock"], shown["enable_ui"], shown["raw_storage_endpoint"]) == (False, False, False)


def test_no_secret_is_shown() -> None:
    assert "s3cret" not in json.dumps(sanitized(load_text(CONFIG)))


def test_a_store_of_one_node_registers_nowhere() -> None:
    shown = sanitized(load_text('storage "inmem" {}\nlistener "tcp" { tls_disable = true }'))
    assert shown["storage"]["type"] == "inmem"
    assert "service_registration" not in shown

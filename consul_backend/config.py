"""How to reach one Consul: explicit settings first, then Consul's own ``CONSUL_*`` variables, then defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from urllib.parse import urlsplit

DEFAULT_ADDRESS = "127.0.0.1:8500"
DEFAULT_PORT = 8500
HTTPS_PORT = 443
DEFAULT_PATH = "outrider/"

_PATH = re.compile(r"(?:[A-Za-z0-9_-]+/)+\Z")

# Setting, variable. Consul's own meaning of each.
_VARIABLES = {
    "address": "CONSUL_HTTP_ADDR",
    "token": "CONSUL_HTTP_TOKEN",
    "token_file": "CONSUL_HTTP_TOKEN_FILE",
    "http_auth": "CONSUL_HTTP_AUTH",
    "namespace": "CONSUL_NAMESPACE",
    "ca_file": "CONSUL_CACERT",
    "ca_path": "CONSUL_CAPATH",
    "client_cert": "CONSUL_CLIENT_CERT",
    "client_key": "CONSUL_CLIENT_KEY",
    "tls_server_name": "CONSUL_TLS_SERVER_NAME",
}
# Vault's names for the same settings.
_ALIASES = {
    "tls_ca_file": "ca_file",
    "tls_ca_path": "ca_path",
    "tls_cert_file": "client_cert",
    "tls_key_file": "client_key",
}
_TRUE = {"1", "t", "true", "yes", "on"}
_FALSE = {"", "0", "f", "false", "no", "off"}


@dataclass(frozen=True, slots=True)
class ConsulConfig:
    """One Consul and one place in it.

    ``address`` is ``host:port``, a URL, or ``unix:///path``. It is HTTPS where either the address or ``scheme`` says
    so, as for Consul's own client; without a port it is 443 then, else 8500. ``path`` is the key prefix: segments of
    ``[A-Za-z0-9_-]``, each with its slash. ``token`` beats ``token_file``, which is read again whenever it changes.
    ``http_auth`` is ``user:password`` for a proxy before Consul. ``ca_path`` is a directory of PEM files. Raises
    ValueError for what cannot work.
    """

    address: str = DEFAULT_ADDRESS
    scheme: str = "http"
    token: str = field(default="", repr=False)
    token_file: str = ""
    http_auth: str = field(default="", repr=False)
    datacenter: str = ""
    namespace: str = ""
    ca_file: str = ""
    ca_path: str = ""
    client_cert: str = ""
    client_key: str = ""
    tls_server_name: str = ""
    tls_skip_verify: bool = False
    path: str = DEFAULT_PATH

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.path.strip("/") + "/")
        if not _PATH.match(self.path):
            raise ValueError(f"consul path {self.path!r}: only letters, digits, '-', '_' between slashes")
        if self.client_key and not self.client_cert:
            raise ValueError("consul client_key without client_cert")
        self.endpoint()

    @classmethod
    def from_env(cls, explicit: Mapping[str, str], environ: Mapping[str, str] | None = None) -> ConsulConfig:
        """Settings by name (Vault's ``tls_*`` file names too), each empty one taken from the environment.

        An explicit address also silences ``CONSUL_HTTP_SSL``, and an explicit token or token file both token variables:
        they belong together; of the two variables the file counts, as for Consul's own client. Raises ValueError for
        unknown names and unusable values.
        """
        environ = os.environ if environ is None else environ
        known = {item.name for item in fields(cls)}
        given = {_ALIASES.get(name, name): value for name, value in explicit.items() if value}
        if unknown := given.keys() - known:
            raise ValueError(f"unknown consul setting: {', '.join(sorted(unknown))}")
        if environ.get("CONSUL_PARTITION", "default") not in ("", "default"):
            raise ValueError("CONSUL_PARTITION: admin partitions are not available; unset it to use the default one")
        values = {name: environ[variable] for name, variable in _VARIABLES.items() if environ.get(variable)}
        if "address" not in given and _truth("CONSUL_HTTP_SSL", environ.get("CONSUL_HTTP_SSL", "")):
            values["scheme"] = "https"
        if "token" in given or "token_file" in given:
            values.pop("token", None)
            values.pop("token_file", None)
        if "token_file" in values:
            values.pop("token", None)
        values.update(given)
        skip = values.pop("tls_skip_verify", "")
        verify = environ.get("CONSUL_HTTP_SSL_VERIFY", "")
        skip_verify = _truth("tls_skip_verify", skip) if skip else bool(verify) and not _truth("verify", verify)
        return cls(**values, tls_skip_verify=skip_verify)

    def endpoint(self) -> tuple[str, str]:
        """Base URL without a trailing slash, and the Unix socket to reach it by (or ``""``). Raises ValueError."""
        address = self.address.strip()
        if address.startswith("unix://"):
            if not (path := address.removeprefix("unix://")):
                raise ValueError("consul address: unix:// and no path")
            return "http://localhost", path
        url = address if "://" in address else f"{self.scheme}://{address}"
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username is not None:
            raise ValueError("consul address: want host:port, http(s)://host:port or unix:///path")
        if parts.path.strip("/") or parts.query or parts.fragment:
            raise ValueError("consul address: nothing may follow the port")
        scheme = "https" if "https" in (parts.scheme, self.scheme) else "http"
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return f"{scheme}://{host}:{parts.port or (HTTPS_PORT if scheme == 'https' else DEFAULT_PORT)}", ""


def _truth(name: str, text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise ValueError(f"{name}: want true or false, not {text!r}")

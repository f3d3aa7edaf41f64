"""``seal "type" {}``: which auto seal the node uses, and which ones its cluster is leaving."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from sidecar.config.ineffective import IN_SEAL
from sidecar.config.reader import ConfigError, Reader, parse_boolean
from sidecar.config.values import SealSettings, StaticSealSettings, TransitSealSettings
from sidecar.hcl import Block

SHAMIR = "shamir"
_KEY_NAME = re.compile(r"\w(([\w.-]+)?\w)?", re.ASCII)
# What each transit setting may also come from: environment variables as Vault documents them, which win.
_ENVIRONMENT = {
    "address": "ADDR",
    "token": "TOKEN",
    "key_name": "TRANSIT_SEAL_KEY_NAME",
    "mount_path": "TRANSIT_SEAL_MOUNT_PATH",
    "namespace": "NAMESPACE",
    "disable_renewal": "TRANSIT_SEAL_DISABLE_RENEWAL",
    "key_id_prefix": "TRANSIT_SEAL_KEY_ID_PREFIX",
    "tls_ca_cert": "CACERT",
    "tls_client_cert": "CLIENT_CERT",
    "tls_client_key": "CLIENT_KEY",
    "tls_server_name": "TLS_SERVER_NAME",
    "tls_skip_verify": "SKIP_VERIFY",
}
_STATIC = ("current_key", "current_key_id", "previous_key", "previous_key_id")


def read_seals(top: Reader, environ: Mapping[str, str]) -> SealSettings:
    """Every ``seal`` stanza. Raises ConfigError for a seal there is none of, for two that are in use, and for values
    that cannot be."""
    in_use: list[tuple[str, StaticSealSettings | TransitSealSettings | None]] = []
    disabled: list[str] = []
    for stanza in top.blocks("seal"):
        kind = _kind(stanza)
        place = f"{stanza.body.filename}:{stanza.line}"
        reader = top.inner(stanza)
        reader.no_effect(IN_SEAL)
        reader.not_available(
            name="there is one seal at a time", priority="there is one seal at a time, without another to fall back on"
        )
        if reader.boolean("disabled"):
            # Nothing is wanted of it but to be left: its keys may be gone already.
            reader.ignore(*_STATIC, *_ENVIRONMENT)
            disabled.append(kind)
        else:
            in_use.append((place, _read(kind, reader, environ, place)))
        reader.finish()
    if len(in_use) > 1:
        raise ConfigError(
            f'{in_use[1][0]}: a second seal; say disabled = "true" in the one that the cluster is to leave'
        )
    if not in_use and (wanted := _environment(environ, "SEAL_TYPE")):
        place = "environment SEAL_TYPE"
        in_use.append((place, _read(_known(wanted, place), Reader([], f'seal "{wanted}"', []), environ, place)))
    return SealSettings(in_use[0][1] if in_use else None, tuple(disabled))


def _kind(stanza: Block) -> str:
    place = f"{stanza.body.filename}:{stanza.line}"
    if len(stanza.labels) != 1:
        raise ConfigError(f'{place}: expected seal "type" {{...}}')
    return _known(stanza.labels[0], place)


def _known(kind: str, place: str) -> str:
    if kind not in (SHAMIR, "static", "transit"):
        raise ConfigError(f'{place}: seal "{kind}" is not available; there are "shamir", "static" and "transit"')
    return kind


def _read(
    kind: str, reader: Reader, environ: Mapping[str, str], place: str
) -> StaticSealSettings | TransitSealSettings | None:
    if kind == "static":
        return _static(reader, place)
    return _transit(reader, environ, place) if kind == "transit" else None


def _static(reader: Reader, place: str) -> StaticSealSettings:
    values = {name: reader.text(name) for name in _STATIC}
    for name in ("current_key", "current_key_id"):
        if not values[name]:
            raise ConfigError(f'{place}: seal "static" needs "{name}"')
    if bool(values["previous_key"]) != bool(values["previous_key_id"]):
        raise ConfigError(f'{place}: seal "static" needs "previous_key" and "previous_key_id" together')
    if values["previous_key_id"] == values["current_key_id"]:
        raise ConfigError(
            f'{place}: seal "static" has "current_key_id" and "previous_key_id" alike: another key has another name'
        )
    return StaticSealSettings(**values)


def _transit(reader: Reader, environ: Mapping[str, str], place: str) -> TransitSealSettings:
    values: dict[str, str] = {}
    for name, variable in _ENVIRONMENT.items():
        if name in ("disable_renewal", "tls_skip_verify"):
            value = str(reader.boolean(name)).lower()
        else:
            value = reader.text(name)
        from_environment = _environment(environ, variable)
        if from_environment and reader.place(name) and from_environment != value:
            reader.warn(f'{place}: "{name}" in seal "transit" gives way to the environment variable VAULT_{variable}')
        values[name] = from_environment or value
    for name in ("address", "token", "key_name", "mount_path"):
        if not values[name]:
            raise ConfigError(f'{place}: seal "transit" needs "{name}" or the variable VAULT_{_ENVIRONMENT[name]}')
    flags = {name: _flag(values[name], name) for name in ("disable_renewal", "tls_skip_verify")}
    if flags["tls_skip_verify"]:
        reader.warn(
            f'{place}: "tls_skip_verify" in seal "transit" lets anybody on the way read and forge the root key\'s key'
        )
    address = urlsplit(values["address"])
    if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
        raise ConfigError(f'{place}: "address" in seal "transit" must be http://host:port or https://host:port')
    if address.scheme == "http" and address.hostname not in ("127.0.0.1", "::1", "localhost"):
        reader.warn(f'{place}: "address" in seal "transit" is http: its token and key travel in clear')
    if not _KEY_NAME.fullmatch(values["key_name"]):
        raise ConfigError(f'{place}: "key_name" in seal "transit" is not the name of a transit key')
    return TransitSealSettings(
        address=values["address"].rstrip("/"),
        token=values["token"],
        key_name=values["key_name"],
        mount_path=values["mount_path"].strip("/"),
        namespace=values["namespace"],
        key_id_prefix=values["key_id_prefix"],
        disable_renewal=flags["disable_renewal"],
        tls_ca_cert=values["tls_ca_cert"],
        tls_client_cert=values["tls_client_cert"],
        tls_client_key=values["tls_client_key"],
        tls_server_name=values["tls_server_name"],
        tls_skip_verify=flags["tls_skip_verify"],
    )


def _flag(text: str, name: str) -> bool:
    try:
        return parse_boolean(text)
    except ValueError:
        raise ConfigError(f"environment {_ENVIRONMENT[name]}: must be true or false") from None


def _environment(environ: Mapping[str, str], name: str) -> str:
    return environ.get(f"OUTRIDER_{name}") or environ.get(f"VAULT_{name}") or ""

"""``outrider transit``: bring a key of one's own into the transit engine, wrapped so that only the engine opens it."""

from __future__ import annotations

import base64
import binascii
import os

from sidecar.cli.client import Client
from sidecar.cli.command import EXIT_OK, EXIT_SERVER, Call, Command, Failed, doing
from sidecar.cli.flags import UsageError
from sidecar.cli.values import parse_data

_EPHEMERAL_BYTES = 32


def _import(call: Call, area: str) -> int:
    """The key is wrapped under a fresh AES key (RFC 5649), and that under the engine's RSA key (OAEP, SHA-256)."""
    mount, found, name = call.path(0, "PATH").partition("/keys/")
    if not found or not name or "/" in name:
        raise UsageError("PATH is MOUNT/keys/NAME")
    key = _key(call.argument(1, "KEY"), call)
    data = parse_data(call.arguments[2:], call.read_stdin)
    client = call.client()
    path = f"{mount}/keys/{name}/{area}"
    request = {"ciphertext": _wrapped(client, mount, key), "hash_function": "SHA256", **data}
    with doing(f"importing the key to {path}"):
        client.post(path, request)
    call.say(f"Success! Imported the key to: {mount}/keys/{name}")
    return EXIT_OK


def _key(text: str, call: Call) -> bytes:
    """The argument itself, ``@file`` or ``-``: base64 of the key's bytes, or of its PKCS #8 form."""
    if text == "-":
        text = call.read_stdin()
    elif text.startswith("@"):
        try:
            with open(text[1:], encoding="ascii") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError):
            raise UsageError(f"cannot read a key from {text[1:]}") from None
    try:
        return base64.b64decode(text.strip(), validate=True)
    except binascii.Error:
        raise UsageError("the key is not base64") from None


def _wrapped(client: Client, mount: str, key: bytes) -> str:
    from cryptography.hazmat.primitives.asymmetric import padding, rsa
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    with doing("reading the wrapping key"):
        body = client.get(f"{mount}/wrapping_key").body or {}
    public = load_pem_public_key(str((body.get("data") or {}).get("public_key", "")).encode())
    if not isinstance(public, rsa.RSAPublicKey):
        raise Failed(f"{mount}/wrapping_key is no RSA key", EXIT_SERVER)
    ephemeral = os.urandom(_EPHEMERAL_BYTES)
    hidden = public.encrypt(ephemeral, padding.OAEP(padding.MGF1(SHA256()), SHA256(), None))
    return base64.b64encode(hidden + aes_key_wrap_with_padding(ephemeral, key)).decode()


_KEY_HELP = "KEY is base64, @file or -: the bytes of a symmetric key, or an asymmetric one as PKCS #8."
IMPORT = Command(
    "transit import [flags] PATH KEY [KEY=VALUE...]",
    f"Make a transit key of a key that exists, as transit/keys/mine. {_KEY_HELP}\n"
    "  Pairs say how, as type=rsa-2048 exportable=true.",
    lambda call: _import(call, "import"),
    formats=False,
)
IMPORT_VERSION = Command(
    "transit import-version [flags] PATH KEY [KEY=VALUE...]",
    f"Make a key that exists the newest version of a transit key that was imported. {_KEY_HELP}",
    lambda call: _import(call, "import_version"),
    formats=False,
)

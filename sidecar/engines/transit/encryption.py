"""``encrypt``, ``decrypt``, ``rewrap`` and ``datakey``."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Awaitable, Callable, Mapping

from plugin_api.errors import InvalidRequest
from plugin_api.framework import Fields, FieldSpec, FieldType, Path, generic_name, writes
from plugin_api.request import Operation, Request, Response
from sidecar.engines.transit.batch import BATCH_FIELD, PARTIAL_FIELD, Inputs, Item, inputs, partial_code
from sidecar.engines.transit.ciphers import check_padding, decrypt, encrypt
from sidecar.engines.transit.encoding import Versioned, decode_base64, encode_base64, parse_versioned
from sidecar.engines.transit.keys import NOT_FOUND, Key
from sidecar.engines.transit.material import Material
from sidecar.engines.transit.ring import KeyRing, new_ring
from sidecar.engines.transit.run import Result, Runner, Versions, context_of

DATA_KEY_BITS = (128, 256, 512)

_TEXT = FieldType.STRING
_PADDING = FieldSpec(_TEXT, description="RSA padding: oaep or pkcs1v15.")
_COMMON = {
    "context": FieldSpec(_TEXT, description="Base64 context of a derived key."),
    "nonce": FieldSpec(_TEXT, description="Not taken: nonces are the engine's own."),
    "reference": FieldSpec(_TEXT, description="Repeated beside the result of a batch's item."),
}
_ASSOCIATED = {"associated_data": FieldSpec(_TEXT, description="Base64 data to authenticate and not to encrypt.")}
_KEY_VERSION = {"key_version": FieldSpec(FieldType.INT, description="Version to encrypt with; the latest if 0.")}
_ENCRYPT = ("plaintext", "context", "associated_data", "nonce", "key_version")
_DECRYPT = ("ciphertext", "context", "associated_data", "nonce")
_REWRAP = ("ciphertext", "context", "nonce", "key_version")
_DATA_KEY = ("context", "nonce", "key_version")

MayUpsert = Callable[[], Awaitable[bool]]


class Encryption:
    """What encrypts and decrypts. With keys that exist nothing is written, so it works on every cluster."""

    def __init__(self, runner: Runner, may_upsert: MayUpsert) -> None:
        self._runner = runner
        self._store = runner.store
        self._may_upsert = may_upsert

    def paths(self) -> list[Path]:
        """The table."""
        name = generic_name("name")
        return [
            Path(
                "encrypt/" + name,
                {
                    "plaintext": FieldSpec(_TEXT, description="Base64 plaintext."),
                    "type": FieldSpec(_TEXT, description="Type of a key that is created by this request."),
                    "convergent_encryption": FieldSpec(FieldType.BOOL, description="For a key that is created."),
                    "padding_scheme": _PADDING,
                }
                | (_COMMON | _ASSOCIATED | _KEY_VERSION | BATCH_FIELD | PARTIAL_FIELD),
                writes(self._encrypt),
                exists=self._exists,
                help="Encrypts; with the create capability, a key that is missing is made.",
            ),
            Path(
                "decrypt/" + name,
                {"ciphertext": FieldSpec(_TEXT, description="Ciphertext."), "padding_scheme": _PADDING}
                | (_COMMON | _ASSOCIATED | BATCH_FIELD | PARTIAL_FIELD),
                writes(self._decrypt),
                help="Decrypts.",
            ),
            Path(
                "rewrap/" + name,
                {
                    "ciphertext": FieldSpec(_TEXT, description="Ciphertext."),
                    "decrypt_padding_scheme": _PADDING,
                    "encrypt_padding_scheme": _PADDING,
                }
                | (_COMMON | _KEY_VERSION | BATCH_FIELD),
                writes(self._rewrap),
                help="Decrypts and encrypts again with a newer version; the plaintext stays inside.",
            ),
            Path(
                "datakey/(?P<form>[^/]+)/" + name,
                {
                    "bits": FieldSpec(FieldType.INT, default=256, description="128, 256 or 512."),
                    "padding_scheme": _PADDING,
                }
                | (_COMMON | _KEY_VERSION),
                writes(self._data_key),
                help="Makes a key and encrypts it; 'plaintext' answers with both, 'wrapped' without the plaintext.",
            ),
        ]

    async def _exists(self, request: Request, fields: Fields) -> bool:
        return await self._store.exists(fields["name"])

    # --- encrypt ---

    async def _encrypt(self, request: Request, fields: Fields) -> Response:
        sent = await inputs(request, fields, _ENCRYPT)
        partial = partial_code(fields)
        scheme = check_padding(fields["padding_scheme"])
        key = await self._store.find(fields["name"])
        if key is None:
            await self._upsert(request, fields, sent)
        key = _able(await self._store.get(fields["name"]), "encryption")

        def work(item: Item, versions: Versions, materials: Mapping[int, Material]) -> Result:
            plaintext = decode_base64(item.needed("plaintext", "missing plaintext to encrypt"), "plaintext")
            return _encrypted(key.ring, item, plaintext, versions[0], materials, scheme)

        results = await self._runner.run(key, sent, lambda item: _newest(key.ring, item), work, slow=key.ring.kind.slow)
        return sent.respond(results, partial=partial)

    async def _upsert(self, request: Request, fields: Fields, sent: Inputs) -> None:
        if request.operation is not Operation.CREATE or not await self._may_upsert():
            raise InvalidRequest(NOT_FOUND)
        with_context = {bool(item.text("context")) for item in sent.items}
        if len(with_context) > 1:
            raise InvalidRequest("context should be set either in all the request blocks or in none")
        settings = {
            "type": fields["type"],
            "derived": with_context.pop(),
            "convergent_encryption": fields["convergent_encryption"],
        }
        ring = new_ring(fields["name"], uuid.uuid4().hex, settings)
        if not ring.kind.encrypts:
            raise InvalidRequest("encryption is not supported for keys of this type")
        await self._store.create(ring)

    # --- decrypt ---

    async def _decrypt(self, request: Request, fields: Fields) -> Response:
        sent = await inputs(request, fields, _DECRYPT)
        partial = partial_code(fields)
        scheme = check_padding(fields["padding_scheme"])
        key = _able(await self._store.get(fields["name"]), "decryption")

        def work(item: Item, versions: Versions, materials: Mapping[int, Material]) -> Result:
            return {"plaintext": encode_base64(_decrypted(key.ring, item, materials[versions[0]], scheme))}

        results = await self._runner.run(
            key, sent, lambda item: (_encrypted_with(key.ring, item),), work, slow=key.ring.kind.slow
        )
        return sent.respond(results, partial=partial)

    # --- rewrap ---

    async def _rewrap(self, request: Request, fields: Fields) -> Response:
        sent = await inputs(request, fields, _REWRAP)
        old_scheme = check_padding(fields["decrypt_padding_scheme"])
        new_scheme = check_padding(fields["encrypt_padding_scheme"])
        key = _able(await self._store.get(fields["name"]), "encryption")

        def work(item: Item, versions: Versions, materials: Mapping[int, Material]) -> Result:
            new, old = versions
            plaintext = _decrypted(key.ring, item, materials[old], old_scheme)
            return _encrypted(key.ring, item, plaintext, new, materials, new_scheme)

        results = await self._runner.run(
            key,
            sent,
            lambda item: (*_newest(key.ring, item), _encrypted_with(key.ring, item)),
            work,
            slow=key.ring.kind.slow,
        )
        return sent.respond(results)

    # --- data keys ---

    async def _data_key(self, request: Request, fields: Fields) -> Response:
        if fields["form"] not in ("plaintext", "wrapped"):
            raise InvalidRequest("Invalid path, must be 'plaintext' or 'wrapped'")
        if fields["bits"] not in DATA_KEY_BITS:
            raise InvalidRequest("invalid bit length")
        scheme = check_padding(fields["padding_scheme"])
        sent = Inputs([Item({name: fields[name] for name in _DATA_KEY})], is_batch=False)
        key = _able(await self._store.get(fields["name"]), "encryption")
        plaintext = secrets.token_bytes(fields["bits"] // 8)

        def work(item: Item, versions: Versions, materials: Mapping[int, Material]) -> Result:
            return _encrypted(key.ring, item, plaintext, versions[0], materials, scheme)

        results = await self._runner.run(key, sent, lambda item: _newest(key.ring, item), work, slow=key.ring.kind.slow)
        if fields["form"] == "plaintext" and "error" not in results[0]:
            results[0]["plaintext"] = encode_base64(plaintext)
        return sent.respond(results)


def _able(key: Key, what: str) -> Key:
    if not key.ring.kind.encrypts:
        raise InvalidRequest(f"{what} is not supported for keys of type {key.ring.type}")
    return key


def _newest(ring: KeyRing, item: Item) -> tuple[int]:
    return (ring.for_encryption(item.number("key_version")),)


def _encrypted_with(ring: KeyRing, item: Item) -> int:
    sent = parse_versioned(item.needed("ciphertext", "missing ciphertext to decrypt"), "ciphertext")
    return ring.for_decryption(sent.version, "ciphertext")


def _encrypted(
    ring: KeyRing, item: Item, plaintext: bytes, version: int, materials: Mapping[int, Material], scheme: str
) -> Result:
    _refuse_nonce(item)
    made = encrypt(
        materials[version],
        plaintext,
        context=context_of(ring, item),
        associated=decode_base64(item.text("associated_data"), "associated_data"),
        convergent=ring.convergent,
        scheme=scheme,
    )
    return {"ciphertext": str(Versioned(version, encode_base64(made))), "key_version": version}


def _decrypted(ring: KeyRing, item: Item, material: Material, scheme: str) -> bytes:
    _refuse_nonce(item)
    sent = parse_versioned(item.text("ciphertext"), "ciphertext")
    return decrypt(
        material,
        decode_base64(sent.body, "ciphertext"),
        context=context_of(ring, item),
        associated=decode_base64(item.text("associated_data"), "associated_data"),
        scheme=scheme,
    )


def _refuse_nonce(item: Item) -> None:
    if item.text("nonce"):
        raise InvalidRequest("provided nonce not allowed for this key")

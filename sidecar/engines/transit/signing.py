"""``hmac``, ``cmac``, ``sign`` and ``verify``."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from plugin_api.errors import InvalidRequest
from plugin_api.framework import Fields, FieldSpec, FieldType, Path, generic_name, writes
from plugin_api.request import Request, Response
from sidecar.engines.transit.batch import BATCH_FIELD, Inputs, Item, inputs
from sidecar.engines.transit.encoding import Versioned, decode_base64, encode_base64, parse_versioned
from sidecar.engines.transit.key_types import CMAC
from sidecar.engines.transit.keys import Key
from sidecar.engines.transit.material import Material
from sidecar.engines.transit.run import Result, Runner, Versions, context_of
from sidecar.engines.transit.signatures import (
    DEFAULT_HASH,
    Scheme,
    digest_name,
    make_cmac,
    make_hmac,
    parse_salt,
    sign,
    verify,
)

_TEXT = FieldType.STRING
_INPUT = {
    "input": FieldSpec(_TEXT, description="Base64 input."),
    "reference": FieldSpec(_TEXT, description="Repeated beside the result of a batch's item."),
} | BATCH_FIELD
_KEY_VERSION = {"key_version": FieldSpec(FieldType.INT, description="Version to use; the latest if 0.")}
_ALGORITHM = {"algorithm": FieldSpec(_TEXT, description="Name of the hash.")}
_SCHEME = {
    "context": FieldSpec(_TEXT, description="Base64 context of a derived key."),
    "hash_algorithm": FieldSpec(_TEXT, description="Name of the hash; none for RSA signatures of the bare input."),
    "prehashed": FieldSpec(FieldType.BOOL, description="Whether the input is a hash already."),
    "signature_algorithm": FieldSpec(_TEXT, default="pss", description="For RSA keys: pss or pkcs1v15."),
    "marshaling_algorithm": FieldSpec(_TEXT, default="asn1", description="asn1 or jws."),
    "salt_length": FieldSpec(_TEXT, default="auto", description="For PSS: auto, hash or bytes."),
} | _ALGORITHM
_MAC_LENGTH = {"mac_length": FieldSpec(FieldType.INT, description="Bytes of the CMAC, 4 to 16; 16 if 0.")}
_MAC_BYTES_MIN, _MAC_BYTES_MAX = 4, 16
_PROOFS = ("signature", "hmac", "cmac")
_IN_PATH = r"(?:/(?P<in_path>[^/]+))?"


class Signing:
    """What proves origin. Nothing is written, so it works on every cluster."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._store = runner.store

    def paths(self) -> list[Path]:
        """The table."""
        name = generic_name("name") + _IN_PATH
        return [
            Path("hmac/" + name, _INPUT | _KEY_VERSION | _ALGORITHM, writes(self._hmac), help="Makes an HMAC."),
            Path(
                "cmac/" + generic_name("name") + r"(?:/(?P<in_path>\d+))?",
                _INPUT | _KEY_VERSION | _MAC_LENGTH,
                writes(self._cmac),
                help="Makes a CMAC.",
            ),
            Path("sign/" + name, _INPUT | _KEY_VERSION | _SCHEME, writes(self._sign), help="Signs."),
            Path(
                "verify/" + name,
                {
                    "signature": FieldSpec(_TEXT, description="Signature to check."),
                    "hmac": FieldSpec(_TEXT, description="HMAC to check."),
                    "cmac": FieldSpec(_TEXT, description="CMAC to check."),
                }
                | (_INPUT | _SCHEME | _MAC_LENGTH),
                writes(self._verify),
                help="Checks a signature, an HMAC or a CMAC.",
            ),
        ]

    async def _hmac(self, request: Request, fields: Fields) -> Response:
        sent = await inputs(request, fields, ("input", "key_version"))
        digest = digest_name(fields.get("in_path") or fields["algorithm"])
        key = await self._store.get(fields["name"])

        def work(item: Item, versions: Versions, materials: Mapping[int, Material]) -> Result:
            data = decode_base64(item.needed("input", "missing input for HMAC"), "input")
            made = make_hmac(materials[versions[0]].record.hmac_key, data, digest)
            return {"hmac": str(Versioned(versions[0], encode_base64(made)))}

        results = await self._runner.run(key, sent, lambda item: _newest(key, item), work, slow=False)
        return sent.respond(results)

    async def _cmac(self, request: Request, fields: Fields) -> Response:
        sent = await inputs(request, fields, ("input", "key_version"))
        length = _mac_length(int(fields.get("in_path") or 0) or fields["mac_length"])
        key = _with_cmac(await self._store.get(fields["name"]))

        def work(item: Item, versions: Versions, materials: Mapping[int, Material]) -> Result:
            data = decode_base64(item.needed("input", "missing input for CMAC"), "input")
            made = make_cmac(materials[versions[0]].record.secret, data, length)
            return {"cmac": str(Versioned(versions[0], encode_base64(made)))}

        results = await self._runner.run(key, sent, lambda item: _newest(key, item), work, slow=False)
        return sent.respond(results)

    async def _sign(self, request: Request, fields: Fields) -> Response:
        sent = await inputs(request, fields, ("input", "context", "key_version"))
        key = _able(await self._store.get(fields["name"]), "signing")
        scheme = _scheme(key, fields)

        def work(item: Item, versions: Versions, materials: Mapping[int, Material]) -> Result:
            data = decode_base64(item.needed("input", "missing input"), "input")
            material, context = materials[versions[0]], context_of(key.ring, item)
            made = sign(material, data, scheme, context)
            result: Result = {"signature": str(Versioned(versions[0], made)), "key_version": versions[0]}
            if context is not None:
                result["publickey"] = material.public_text(context)
            return result

        # The version comes from the request, also in a batch.
        number = key.ring.for_encryption(fields["key_version"])
        results = await self._runner.run(
            key,
            sent,
            lambda item: _newest(key, item) if item.given("key_version") else (number,),
            work,
            slow=key.ring.kind.slow,
        )
        return sent.respond(results)

    async def _verify(self, request: Request, fields: Fields) -> Response:
        sent = await inputs(request, fields, ("input", *_PROOFS, "context"))
        kind = _proof(sent)
        key = await self._store.get(fields["name"])
        digest = digest_name(_hash_name(fields)) if kind == "hmac" else ""
        length = _mac_length(fields["mac_length"]) if kind == "cmac" else 0
        if kind == "cmac":
            _with_cmac(key)
        scheme = _scheme(_able(key, "verification"), fields) if kind == "signature" else Scheme()

        def work(item: Item, versions: Versions, materials: Mapping[int, Material]) -> Result:
            material = materials[versions[0]]
            if kind == "hmac":
                return {"valid": _hmac_is_valid(item, material, digest)}
            if kind == "cmac":
                return {"valid": _cmac_is_valid(item, material, length)}
            return {"valid": _signature_is_valid(key, item, material, scheme)}

        results = await self._runner.run(
            key,
            sent,
            lambda item: (key.ring.for_decryption(parse_versioned(item.text(kind), kind).version, kind),),
            work,
            slow=kind == "signature" and key.ring.kind.slow,
        )
        return sent.respond(results)


def _able(key: Key, what: str) -> Key:
    if not key.ring.kind.signs:
        raise InvalidRequest(f"{what} is not supported for keys of type {key.ring.type}")
    return key


def _newest(key: Key, item: Item) -> tuple[int]:
    return (key.ring.for_encryption(item.number("key_version")),)


def _hash_name(fields: Fields) -> str:
    """The path wins over the body, and the newer name of the field over the older one."""
    return fields.get("in_path") or fields["hash_algorithm"] or fields["algorithm"] or DEFAULT_HASH


def _scheme(key: Key, fields: Fields) -> Scheme:
    scheme = Scheme(
        hash_name=_hash_name(fields),
        prehashed=fields["prehashed"],
        algorithm=fields["signature_algorithm"] or "pss",
        marshaling=fields["marshaling_algorithm"] or "asn1",
        salt=parse_salt(fields["salt_length"]),
    )
    scheme.check(key.ring.kind.family)
    return scheme


def _proof(sent: Inputs) -> str:
    """What the request wants checked: all its inputs must carry the same."""
    found = {tuple(name for name in _PROOFS if item.given(name)) for item in sent.items}
    if len(found) == 1 and len(kinds := found.pop()) == 1:
        return kinds[0]
    raise InvalidRequest("one of 'signature', 'hmac' and 'cmac' must be given to verify, the same in every input")


def _hmac_is_valid(item: Item, material: Material, digest: str) -> bool:
    data = decode_base64(item.needed("input", "missing input"), "input")
    sent = decode_base64(parse_versioned(item.text("hmac"), "hmac").body, "hmac")
    return hmac.compare_digest(make_hmac(material.record.hmac_key, data, digest), sent)


def _mac_length(asked: int) -> int:
    """Raises InvalidRequest."""
    if not asked:
        return _MAC_BYTES_MAX
    if not _MAC_BYTES_MIN <= asked <= _MAC_BYTES_MAX:
        raise InvalidRequest(f"mac_length must be {_MAC_BYTES_MIN} to {_MAC_BYTES_MAX} bytes")
    return asked


def _with_cmac(key: Key) -> Key:
    if key.ring.kind.family != CMAC:
        raise InvalidRequest(f"CMAC is not supported for keys of type {key.ring.type}")
    return key


def _cmac_is_valid(item: Item, material: Material, length: int) -> bool:
    data = decode_base64(item.needed("input", "missing input"), "input")
    sent = decode_base64(parse_versioned(item.text("cmac"), "cmac").body, "cmac")
    return hmac.compare_digest(make_cmac(material.record.secret, data, length), sent)


def _signature_is_valid(key: Key, item: Item, material: Material, scheme: Scheme) -> bool:
    data = decode_base64(item.needed("input", "missing input"), "input")
    signature = parse_versioned(item.text("signature"), "signature").body
    return verify(material, data, signature, scheme, context_of(key.ring, item))

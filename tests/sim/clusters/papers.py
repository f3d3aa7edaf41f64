"""Certificates as far as replication looks at them: who is named, who vouches, and a fingerprint. No cryptography:
that is what the integration tests have, and it would take nine tenths of a simulated second."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

from sidecar.replication.history import Epoch
from sidecar.transport.certificates import Credentials

FAR_S = 4_000_000_000.0


class Printer:
    """Makes them, numbered."""

    def __init__(self) -> None:
        self._number = 0

    def authority(self, name: str) -> Credentials:
        """``certificates.make_authority``."""
        self._number += 1
        return Credentials(b"<authority %d>" % self._number, b"<key %d>" % self._number)

    def server(self, authority: Credentials, name: str) -> Credentials:
        """``certificates.issue_server``."""
        return Credentials(b"[server %s]%s" % (name.encode(), authority.certificate_pem), b"<key>")

    def bundle(
        self,
        authority: Credentials,
        *,
        secondary_id: str,
        set_id: str,
        epoch: Epoch,
        primary_cluster_addr: str,
        validity: timedelta,
    ) -> tuple[dict[str, Any], dict[str, Any], str]:
        """``activation.build_bundle``."""
        self._number += 1
        shown = b"[client %s %d]%s" % (secondary_id.encode(), self._number, authority.certificate_pem)
        payload = {
            "id": secondary_id,
            "set_id": set_id,
            "epoch": epoch,
            "address": primary_cluster_addr,
            "authority": authority.certificate_pem,
            "credentials": Credentials(shown, b"<key>"),
        }
        return payload, {"ca_sha256": ""}, fingerprint(shown)


def vouches(authorities: bytes, certificate: bytes) -> bool:
    """Whether one of these authorities signed it."""
    return certificate.partition(b"]")[2] in authorities


def name_in(certificate: bytes) -> str:
    """Whom it names."""
    return certificate.split(b" ")[1].decode()


def fingerprint(certificate: bytes) -> str:
    """``certificates.fingerprint``."""
    return hashlib.sha256(certificate).hexdigest()


def period_s(certificate: bytes) -> tuple[float, float]:
    """``certificates.period_s``: none ends."""
    return 0.0, FAR_S

"""The performance role: what is allowed when, and what a change leaves behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from consul_backend.errors import Corrupt
from plugin_api.errors import InvalidRequest, PermissionDenied
from sidecar.replication import roles
from sidecar.replication.roles import DisabledRole, Epoch, PrimaryRole, Role, SecondaryRole
from sidecar.transport.certificates import Credentials

AUTHORITY = Credentials(b"authority certificate", b"authority key")
EPOCH = Epoch(1, "epoch-id")


def primary() -> PrimaryRole:
    return roles.enable_primary(
        DisabledRole(), set_id="set", epoch_id="epoch-id", cluster_addr="https://us:8201", authority=AUTHORITY
    )


def secondary() -> SecondaryRole:
    return SecondaryRole(
        set_id="set",
        epoch=EPOCH,
        secondary_id="eu",
        store_id="store",
        primary_cluster_addr="https://us:8201",
        primary_api_addr="https://us:8200",
        authority_pem=b"authority",
        certificate_pem=b"certificate",
        key_pem=b"key bytes",
    )


def with_secondary(role: PrimaryRole, fingerprint: str = "f1") -> PrimaryRole:
    return roles.add_secondary(role, "eu", fingerprint, now_ms=1000, ttl_ms=60_000)[0]


def claimed(role: PrimaryRole, store_id: str = "store") -> PrimaryRole:
    return roles.claim_store(role, "f1", "set", EPOCH, store_id, now_ms=2000)


CHANGES: dict[str, Callable[[Role], object]] = {
    "primary/enable": lambda role: roles.enable_primary(
        role, set_id="s", epoch_id="e", cluster_addr="", authority=AUTHORITY
    ),
    "primary/disable": roles.disable_primary,
    "primary/secondary-token": lambda role: roles.add_secondary(role, "eu", "f1", now_ms=0, ttl_ms=1),
    "primary/revoke-secondary": lambda role: roles.revoke(role, "eu"),
    "secondary/enable": roles.require_disabled,
    "secondary/disable": roles.disable_secondary,
}

ALLOWED = {
    ("disabled", "primary/enable"),
    ("disabled", "secondary/enable"),
    ("primary", "primary/disable"),
    ("primary", "primary/secondary-token"),
    ("primary", "primary/revoke-secondary"),
    ("secondary", "secondary/disable"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["disabled", "primary", "secondary"])
def test_who_may_do_what(name: str, change: str) -> None:
    role: Role = {"disabled": DisabledRole(), "primary": with_secondary(primary()), "secondary": secondary()}[name]
    if (name, change) in ALLOWED:
        CHANGES[change](role)
    else:
        with pytest.raises(InvalidRequest):
            CHANGES[change](role)


@pytest.mark.parametrize("role", [DisabledRole(), with_secondary(primary()), secondary()])
def test_a_role_survives_storage(role: Role) -> None:
    assert roles.decode_role(roles.encode_role(role)) == role


def test_no_entry_is_no_replication_and_a_bad_entry_is_corrupt() -> None:
    assert roles.decode_role(None) == DisabledRole()
    raw = roles.encode_role(secondary())
    for bad in (b"", b"{}", raw[:-1], b"\xc1" + raw):
        with pytest.raises(Corrupt):
            roles.decode_role(bad)


def test_no_secret_in_a_repr() -> None:
    assert "authority key" not in repr(primary())
    assert "key bytes" not in repr(secondary())


@pytest.mark.parametrize("good", ["a", "eu-1", "eu.west_1", "A1", "x" * 256])
def test_ids_that_are_taken(good: str) -> None:
    assert roles.check_id(good) == good


@pytest.mark.parametrize("bad", ["", "-a", "a-", ".current", "a/b", "a b", "ä", "a\n", "x" * 257])
def test_ids_that_are_refused(bad: str) -> None:
    with pytest.raises(InvalidRequest):
        roles.check_id(bad)


def test_an_id_that_never_connected_may_be_issued_again_and_voids_the_first() -> None:
    before = with_secondary(primary(), "f1")
    after, replaced = roles.add_secondary(before, "eu", "f2", now_ms=0, ttl_ms=1)
    assert replaced == "f1"
    assert after.by_fingerprint("f1") is None
    known = after.by_fingerprint("f2")
    assert known is not None
    assert known.store_id == ""


def test_a_connected_id_is_unique() -> None:
    role = roles.connect(claimed(with_secondary(primary())), "f1", "set", "store")
    with pytest.raises(InvalidRequest, match="exists already"):
        roles.add_secondary(role, "eu", "f2", now_ms=0, ttl_ms=1)
    revoked, fingerprint = roles.revoke(role, "eu")
    assert fingerprint == "f1"
    assert revoked.secondaries == {}
    roles.add_secondary(revoked, "eu", "f2", now_ms=0, ttl_ms=1)


def test_unknown_ids_cannot_be_revoked() -> None:
    with pytest.raises(InvalidRequest, match="no secondary"):
        roles.revoke(primary(), "eu")


def test_an_activation_belongs_to_the_first_store_that_claims_it() -> None:
    role = claimed(with_secondary(primary()))
    assert claimed(role) is role
    with pytest.raises(PermissionDenied, match="used already"):
        claimed(role, "another store")
    connected = roles.connect(role, "f1", "set", "store")
    assert roles.connect(connected, "f1", "set", "store") is connected
    with pytest.raises(PermissionDenied, match="used already"):
        claimed(connected)


@pytest.mark.parametrize(
    ("fingerprint", "set_id", "epoch", "store_id", "now_ms"),
    [
        pytest.param("f9", "set", EPOCH, "store", 0, id="unknown certificate"),
        pytest.param("f1", "other", EPOCH, "store", 0, id="another set"),
        pytest.param("f1", "set", Epoch(1, "other"), "store", 0, id="a fork of the epoch"),
        pytest.param("f1", "set", Epoch(2, "epoch-id"), "store", 0, id="another epoch"),
        pytest.param("f1", "set", EPOCH, "", 0, id="no store"),
        pytest.param("f1", "set", EPOCH, "store", 10**9, id="long expired"),
    ],
)
def test_bootstraps_that_are_refused(fingerprint: str, set_id: str, epoch: Epoch, store_id: str, now_ms: int) -> None:
    role = with_secondary(primary())
    with pytest.raises(PermissionDenied):
        roles.claim_store(role, fingerprint, set_id, epoch, store_id, now_ms=now_ms)


@pytest.mark.parametrize(
    ("fingerprint", "set_id", "store_id"), [("f9", "set", "store"), ("f1", "other", "store"), ("f1", "set", "other")]
)
def test_hellos_that_are_refused(fingerprint: str, set_id: str, store_id: str) -> None:
    with pytest.raises(PermissionDenied):
        roles.connect(claimed(with_secondary(primary())), fingerprint, set_id, store_id)


def test_addresses_are_learned_in_order_and_bounded() -> None:
    role = secondary()
    assert role.dial_order == ("https://us:8201",)
    assert roles.learn_addresses(role, []) is role
    learned = roles.learn_addresses(role, ["https://b:8201", "", "https://us:8201", "https://b:8201"])
    assert learned.dial_order == ("https://b:8201", "https://us:8201")
    assert roles.learn_addresses(learned, learned.addresses) is learned
    alone = roles.learn_addresses(learned, ["https://c:8201"])
    assert alone.dial_order == ("https://c:8201", "https://b:8201", "https://us:8201"), "the others are not forgotten"
    assert len(roles.learn_addresses(role, [f"https://h{n}:8201" for n in range(99)]).addresses) == 16


@pytest.mark.parametrize("bad", ["https://", "ftp://x", "https://x/path", "https://x:notaport"])
def test_cluster_addresses_are_checked(bad: str) -> None:
    roles.check_cluster_addr("")
    roles.check_cluster_addr("https://10.0.0.1:8201")
    with pytest.raises(InvalidRequest):
        roles.check_cluster_addr(bad)


def test_only_performance_is_replicated() -> None:
    roles.require_performance("performance")
    with pytest.raises(InvalidRequest):
        roles.require_performance("dr")

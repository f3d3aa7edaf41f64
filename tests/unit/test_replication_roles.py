"""A role in either mode: what is allowed when, and what a change leaves behind."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from consul_backend.errors import Corrupt
from consul_backend.position import Position
from plugin_api.errors import InvalidRequest, PermissionDenied
from sidecar.replication import allow_list, authorities, roles
from sidecar.replication.history import Epoch, Promotion
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from sidecar.replication.roles import DisabledRole, PrimaryRole, Role, SecondaryRole
from sidecar.transport.certificates import Credentials

AUTHORITY = Credentials(b"authority certificate", b"authority key")
BEGAN = Promotion(1, "epoch-id")
EPOCH = Epoch(1, "epoch-id")
NEXT = Promotion(2, "second", 5000, Position("set", "g", 1, 7, bytes(32)), "mine", 9)


def primary(mode: Mode = PERFORMANCE) -> PrimaryRole:
    return roles.enable_primary(
        mode, DisabledRole(), set_id="set", began=BEGAN, cluster_addr="https://us:8201", authority=AUTHORITY
    )


def secondary() -> SecondaryRole:
    return SecondaryRole(
        set_id="set",
        history=(BEGAN,),
        secondary_id="eu",
        store_id="store",
        primary_cluster_addr="https://us:8201",
        primary_api_addr="https://us:8200",
        authority_pem=b"authority",
        certificate_pem=b"certificate",
        key_pem=b"key bytes",
    )


def with_secondary(role: PrimaryRole, fingerprint: str = "f1") -> PrimaryRole:
    return allow_list.add_secondary(PERFORMANCE, role, "eu", fingerprint, now_ms=1000, ttl_ms=60_000)[0]


def claimed(role: PrimaryRole, store_id: str = "store") -> PrimaryRole:
    return allow_list.claim_store(PERFORMANCE, role, "f1", "set", EPOCH, store_id, now_ms=2000)


CHANGES: dict[str, Callable[[Mode, Role], object]] = {
    "primary/enable": lambda mode, role: roles.enable_primary(
        mode, role, set_id="s", began=BEGAN, cluster_addr="", authority=AUTHORITY
    ),
    "primary/demote": roles.demote,
    "primary/disable": lambda mode, role: roles.disable(mode, role, "primary/disable"),
    "primary/secondary-token": lambda mode, role: allow_list.add_secondary(mode, role, "eu", "f1", now_ms=0, ttl_ms=1)[
        0
    ],
    "primary/revoke-secondary": lambda mode, role: allow_list.revoke(mode, role, "eu")[0],
    "primary/rotate-ca": lambda mode, role: authorities.begin(mode, role, AUTHORITY, deadline_ms=1),
    "secondary/enable": lambda mode, role: roles.require(mode, role, "secondary/enable") or secondary(),
    "secondary/generate-public-key": lambda mode, role: (
        roles.require(mode, role, "secondary/generate-public-key") or role
    ),
    "secondary/promote": lambda mode, role: roles.promote(mode, role, began=NEXT, cluster_addr="", authority=AUTHORITY),
    "secondary/disable": lambda mode, role: roles.disable(mode, role, "secondary/disable"),
    "secondary/update-primary": roles.forget_primary,
}


@pytest.mark.parametrize("mode", [PERFORMANCE, DR])
@pytest.mark.parametrize("operation", roles.TABLE)
@pytest.mark.parametrize("name", ["disabled", "primary", "secondary"])
def test_every_operation_in_every_role_does_what_the_table_says(name: str, operation: str, mode: Mode) -> None:
    role: Role = {"disabled": DisabledRole(), "primary": with_secondary(primary()), "secondary": secondary()}[name]
    outcome = roles.TABLE[operation][name]
    if isinstance(outcome, roles.To):
        after = CHANGES[operation](mode, role)
        assert isinstance(after, DisabledRole | PrimaryRole | SecondaryRole)
        assert after.kind == outcome.kind
    else:
        with pytest.raises(InvalidRequest) as refused:
            CHANGES[operation](mode, role)
        if mode is DR and outcome.text == "this cluster is not a {label} secondary":
            assert str(refused.value) == "Not a DR secondary."
        else:
            assert str(refused.value) == outcome.text.format(label=mode.label)


def test_the_table_is_whole() -> None:
    assert set(CHANGES) == set(roles.TABLE)
    assert all(set(row) == {"disabled", "primary", "secondary"} for row in roles.TABLE.values())


def test_a_promotion_begins_an_epoch_and_keeps_the_set() -> None:
    after = roles.promote(DR, secondary(), began=NEXT, cluster_addr="", authority=AUTHORITY)
    assert (after.set_id, after.epoch, after.history) == ("set", Epoch(2, "second"), (BEGAN, NEXT))
    assert after.secondaries == {}, "whoever followed the old primary needs a new token"


def test_a_demoted_primary_follows_nobody_and_knows_its_epochs() -> None:
    after = roles.demote(DR, with_secondary(primary()))
    assert (after.attached, after.history, after.dial_order) == (False, (BEGAN,), ())
    assert b"authority key" not in roles.encode_role(after)


def test_only_an_operators_token_accepts_a_fork() -> None:
    lone = msgspec.structs.replace(secondary(), history=(BEGAN, NEXT))
    target = msgspec.structs.replace(
        secondary(), history=(BEGAN, Promotion(2, "twin")), primary_cluster_addr="https://b"
    )
    pointed = roles.point_at(DR, lone, target)
    assert pointed.history == (BEGAN, NEXT), "its data is still of its own epochs"
    assert pointed.accepts == Epoch(2, "twin")
    adopted = roles.adopt(pointed, target.history, pointed.history)
    assert (adopted.accepts, adopted.history, adopted.before) == (None, target.history, (BEGAN, NEXT))
    with pytest.raises(InvalidRequest, match="another replication set"):
        roles.point_at(DR, lone, msgspec.structs.replace(target, set_id="other"))


def test_addresses_instead_of_a_token() -> None:
    moved = roles.redirect(DR, secondary(), ["https://b:8201", "https://c:8201"])
    assert moved.dial_order == ("https://b:8201", "https://c:8201")
    assert moved.credentials == secondary().credentials
    for addresses in ([], ["https://x/path"], [f"https://h{n}:8201" for n in range(17)]):
        with pytest.raises(InvalidRequest):
            roles.redirect(DR, secondary(), addresses)
    with pytest.raises(InvalidRequest, match="token"):
        roles.redirect(DR, roles.demote(DR, primary()), ["https://b:8201"])


def test_a_promoted_mirror_goes_on_as_what_its_primary_was() -> None:
    before = with_secondary(primary())
    after = roles.take_over(before, began=msgspec.structs.replace(NEXT, fork=Position("dr-set", "g", 9, 7, bytes(32))))
    assert isinstance(after, PrimaryRole)
    assert after.epoch == Epoch(2, "second")
    assert after.secondaries == before.secondaries
    assert after.history[-1].fork == Position("set", "g", 1, 7, bytes(32)), "in terms of the performance set"
    with pytest.raises(PermissionDenied, match="earlier replication epoch"):
        claimed(after)
    for other in (secondary(), DisabledRole()):
        assert roles.take_over(other, began=NEXT) is other


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
    after, replaced = allow_list.add_secondary(PERFORMANCE, before, "eu", "f2", now_ms=0, ttl_ms=1)
    assert replaced == "f1"
    assert after.by_fingerprint("f1") is None
    known = after.by_fingerprint("f2")
    assert known is not None
    assert known.store_id == ""


def test_a_connected_id_is_unique() -> None:
    role = allow_list.connect(PERFORMANCE, claimed(with_secondary(primary())), "f1", "set", "store")
    with pytest.raises(InvalidRequest, match="exists already"):
        allow_list.add_secondary(PERFORMANCE, role, "eu", "f2", now_ms=0, ttl_ms=1)
    revoked, fingerprints = allow_list.revoke(PERFORMANCE, role, "eu")
    assert fingerprints == ("f1",)
    assert revoked.secondaries == {}
    allow_list.add_secondary(PERFORMANCE, revoked, "eu", "f2", now_ms=0, ttl_ms=1)


def test_unknown_ids_cannot_be_revoked() -> None:
    with pytest.raises(InvalidRequest, match="no secondary"):
        allow_list.revoke(PERFORMANCE, primary(), "eu")


def test_an_activation_belongs_to_the_first_store_that_claims_it() -> None:
    role = claimed(with_secondary(primary()))
    assert claimed(role) is role
    with pytest.raises(PermissionDenied, match="used already"):
        claimed(role, "another store")
    connected = allow_list.connect(PERFORMANCE, role, "f1", "set", "store")
    assert allow_list.connect(PERFORMANCE, connected, "f1", "set", "store") is connected
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
        allow_list.claim_store(PERFORMANCE, role, fingerprint, set_id, epoch, store_id, now_ms=now_ms)


@pytest.mark.parametrize(
    ("fingerprint", "set_id", "store_id"), [("f9", "set", "store"), ("f1", "other", "store"), ("f1", "set", "other")]
)
def test_hellos_that_are_refused(fingerprint: str, set_id: str, store_id: str) -> None:
    with pytest.raises(PermissionDenied):
        allow_list.connect(PERFORMANCE, claimed(with_secondary(primary())), fingerprint, set_id, store_id)


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

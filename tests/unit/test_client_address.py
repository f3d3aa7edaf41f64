"""X-Forwarded-For: whom to believe and how far; first the rule, then a listener that has one."""

import ipaddress
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.api.client_address import AddressRefused, ForwardedFor
from sidecar.api.server import ServerLimits
from sidecar.config import ConfigError, ForwardedForSettings, load_text
from tests.support.service_node import Harness, running

TRUSTED = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1"))
CHAIN = "1.2.3.4, 2.3.4.5, 3.4.5.6, 4.5.6.7"
MISSING = "missing x-forwarded-for header and configured to reject when not present"
UNTRUSTED = "client address not authorized for x-forwarded-for and configured to reject connection"


def refusal(rule: ForwardedFor, peer: str, *headers: str) -> str:
    with pytest.raises(AddressRefused) as refused:
        rule.client_address(peer, headers)
    return str(refused.value)


def test_the_last_address_counts_unless_hops_are_skipped() -> None:
    for skips, address in enumerate(("4.5.6.7", "3.4.5.6", "2.3.4.5", "1.2.3.4")):
        assert ForwardedFor(TRUSTED, skips).client_address("10.1.1.1", [CHAIN]) == address
        assert ForwardedFor(TRUSTED, skips).client_address("10.1.1.1", CHAIN.split(", ")) == address
    text = refusal(ForwardedFor(TRUSTED, 4), "10.1.1.1", CHAIN)
    assert text == "malformed x-forwarded-for configuration or request: 4 hops to skip in a chain of 4"


def test_a_client_cannot_choose_its_address_through_a_proxy() -> None:
    forged = "127.0.0.1, 10.0.0.1, 192.0.2.9"
    assert ForwardedFor(TRUSTED).client_address("10.1.1.1", [forged]) == "192.0.2.9"


def test_who_is_not_believed_is_refused_or_taken_as_is() -> None:
    strict, lax = ForwardedFor(TRUSTED), ForwardedFor(TRUSTED, 0, reject_not_authorized=False, reject_not_present=False)
    assert refusal(strict, "192.0.2.1", "1.2.3.4") == UNTRUSTED
    assert refusal(strict, "", "1.2.3.4") == UNTRUSTED
    assert lax.client_address("192.0.2.1", ["1.2.3.4"]) == "192.0.2.1"
    for headers in ((), ("",), (" , ",)):
        assert refusal(strict, "10.1.1.1", *headers) == MISSING
        assert lax.client_address("10.1.1.1", headers) == "10.1.1.1"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("1.2.3.4:5678", "1.2.3.4"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("2001:DB8::1", "2001:db8::1"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
    ],
)
def test_forms_of_an_address(text: str, address: str) -> None:
    assert ForwardedFor(TRUSTED).client_address("::ffff:10.0.0.1", [text]) == address


@pytest.mark.parametrize("text", ["unknown", "_hidden", "1.2.3", "1.2.3.4.5", "1.2.3.4,", "[::1", "::g"])
def test_what_is_no_address_is_refused(text: str) -> None:
    assert refusal(ForwardedFor(TRUSTED), "10.0.0.1", text) == "malformed x-forwarded-for address"


@given(st.lists(st.text(max_size=30), max_size=4), st.integers(0, 5))
def test_any_header_is_an_address_or_refused(headers: list[str], skips: int) -> None:
    try:
        address = ForwardedFor(TRUSTED, skips).client_address("10.0.0.1", headers)
    except AddressRefused:
        return
    ipaddress.ip_address(address)


# -- a listener


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    limits = ServerLimits(forwarded_for=ForwardedFor((ipaddress.ip_network("127.0.0.0/8"),)))
    async with running(limits=limits) as harness:
        yield harness


async def test_bound_addresses_are_the_clients(node: Harness) -> None:
    seen: dict[str, str] = {"X_Forwarded_For": "192.0.2.7"}
    body = {"allowed_policies": "default", "token_bound_cidrs": "192.0.2.0/24"}
    assert (await node.call("POST", "auth/token/roles/bound", body, **seen)).status == 204
    made = await node.call("POST", "auth/token/create/bound", {}, **seen)
    token = made.body["auth"]["client_token"]
    for address, status in (("192.0.2.200", 200), ("192.0.2.1, 198.51.100.1", 403), ("198.51.100.1, 192.0.2.3", 200)):
        reply = await node.call("GET", "auth/token/lookup-self", token=token, X_Forwarded_For=address)
        assert reply.status == status
    shown = (await node.call("GET", "sys/in-flight-req", **seen)).body
    assert [entry["client_remote_address"].rpartition(":")[0] for entry in shown.values()] == ["192.0.2.7"]


async def test_nothing_is_served_without_the_header(node: Harness) -> None:
    for path in ("sys/health", "sys/mounts", "../x"):
        reply = await node.call("GET", path)
        assert (reply.status, reply.errors) == (400, [MISSING])
    assert (await node.call("GET", "sys/health", X_Forwarded_For="192.0.2.7")).status == 200


def config(*lines: str) -> Any:
    return load_text('storage "inmem" {}\nlistener "tcp" {\n tls_disable = true\n' + "\n".join(lines) + "\n}", "f")


def test_what_the_configuration_says() -> None:
    assert config().listeners[0].forwarded_for is None
    loaded = config(
        'x_forwarded_for_authorized_addrs = "10.0.0.1, 10.1.0.0/16"',
        'x_forwarded_for_hop_skips = "1"',
        "x_forwarded_for_reject_not_authorized = false",
        'x_forwarded_for_reject_not_present = "false"',
    )
    assert loaded.listeners[0].forwarded_for == ForwardedForSettings(("10.0.0.1", "10.1.0.0/16"), 1, False, False)
    assert loaded.warnings == ()
    assert len(config("x_forwarded_for_hop_skips = 1").warnings) == 1, "there is nobody to believe"
    with pytest.raises(ConfigError, match=r"f:4: .*must hold addresses and networks only"):
        config('x_forwarded_for_authorized_addrs = ["example.com"]')

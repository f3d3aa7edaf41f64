"""The ports that tests give to nodes: below the range of outgoing connections, and each process's its own."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterator

import pytest

from tests.support import ports


@pytest.fixture
def two_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ports.PortBlock]]:
    """As two processes have them, on a machine that leaves room for some."""
    monkeypatch.setattr(ports, "_blocks", lambda: itertools.count(ports.FIRST_PORT, ports.BLOCK_PORTS))
    found = [block for _ in range(2) if (block := ports.take_block()) is not None]
    yield found
    for block in found:
        block.close()


def test_each_process_has_a_block_and_each_port_its_turn(two_blocks: list[ports.PortBlock]) -> None:
    taken = [[block.take() for _ in range(ports.BLOCK_PORTS // 2)] for block in two_blocks]
    assert len(taken) == 2
    assert len({port for some in taken for port in some}) == 2 * (ports.BLOCK_PORTS // 2)


def test_a_port_that_is_in_use_is_passed_over(two_blocks: list[ports.PortBlock]) -> None:
    block, _ = two_blocks
    first = block.take()
    with contextlib.suppress(OSError), socket.socket() as busy:  # somebody else has it already: as good
        busy.bind(("127.0.0.1", first + 1))
        assert block.take() != first + 1


def test_two_ports_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    first = ports.two_free_ports()
    for port in (first, first + 1):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
    # Where connections are given every port, nothing better can be had than the kernel's word; and it comes to an end.
    monkeypatch.setattr(ports, "_block", None)
    monkeypatch.setattr(ports, "take_block", lambda: None)
    assert ports.two_free_ports() > 1023

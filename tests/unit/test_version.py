"""What clients conclude from the version that the API answers."""

from __future__ import annotations

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from sidecar.node import Node
from sidecar.version import API_VERSION, COMPATIBLE_WITH, __version__


@pytest.mark.parametrize(
    ("client", "wants"),
    [
        ("Nomad's constraint on jobs with a vault block", ">=0.6.1"),
        ("Terraform's provider, for custom metadata of KV version 2", ">=1.9.0"),
        ("Terraform's provider, for tuning of mounts", ">=1.11.0"),
    ],
)
def test_clients_that_ask_for_a_version_of_vault_find_it(client: str, wants: str) -> None:
    assert SpecifierSet(wants).contains(Version(Node.version)), client
    assert not SpecifierSet(wants).contains(Version(__version__)), "our own version would not do"


def test_it_says_what_it_is_and_does_not_pass_for_the_enterprise_server() -> None:
    """Terraform's provider takes a server for it by "ent" behind the plus sign."""
    core, _, what = API_VERSION.partition("+")
    assert core == COMPATIBLE_WITH
    assert what == f"outrider.{__version__}"
    assert "ent" not in what

"""Finding a Consul binary: what is here comes first, and the mirror comes from the machine's own apt sources."""

import os
from pathlib import Path

import pytest

from scripts import consul_binary
from scripts.consul_binary import NoConsul, find_consul, obtain_consul
from scripts.debian_package import NoPackage, debian_mirror


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without Consul, with an empty cache."""
    monkeypatch.delenv("CONSUL_BIN", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(consul_binary, "CACHE", tmp_path / "cache")
    return tmp_path


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_variable_then_path_then_cache(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_consul() is None
    cached = program(bare / "cache" / "usr" / "bin" / "consul")
    assert find_consul() == obtain_consul() == cached
    on_path = program(bare / "bin" / "consul")
    assert find_consul() == on_path
    named = program(bare / "elsewhere")
    monkeypatch.setenv("CONSUL_BIN", str(named))
    assert find_consul() == named


def test_a_named_binary_must_be_one(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSUL_BIN", str(bare / "none"))
    with pytest.raises(NoConsul, match="CONSUL_BIN"):
        obtain_consul()


def test_a_machine_without_apt_is_told_what_to_do(bare: Path) -> None:
    assert os.environ["PATH"] == str(bare / "bin")
    with pytest.raises(NoConsul, match="apt-get and dpkg-deb missing"):
        obtain_consul()


OTHERS = "deb [signed-by=/x.gpg] http://example.invalid/packages stable main\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sources.list", OTHERS + "deb http://mirror.test/debian bookworm main contrib\n"),
        (
            "sources.list.d/a.list",
            "# deb http://old/debian x main\ndeb [arch=amd64] http://mirror.test/debian/ trixie main\n",
        ),
        (
            "sources.list.d/debian.sources",
            "Types: deb\nURIs: http://off.test/debian\nSuites: bookworm\nComponents: main\nEnabled: no\n\n"
            "Types: deb-src\nURIs: http://src.test/debian\nSuites: bookworm\nComponents: main\n\n"
            "Types: deb deb-src\n# a comment\nURIs: http://sec.test/debian-security\n  http://mirror.test/debian\n"
            "Suites: bookworm bookworm-updates\nComponents: main\nSigned-By:\n -----BEGIN PGP-----\n .\n abc\n",
        ),
    ],
)
def test_the_mirror_in_both_notations(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert debian_mirror(tmp_path) == "http://mirror.test/debian"


def test_no_debian_among_the_sources(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text(OTHERS)
    with pytest.raises(NoPackage, match="no Debian archive"):
        debian_mirror(tmp_path)

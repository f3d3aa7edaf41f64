"""Imports point one way (architecture, sections 2 and 9). Every import counts, also inside functions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("plugin_api", "consul_backend", "sidecar", "tests", "bench", "scripts")

# The longest matching key decides; a value lists what of ours may be imported from there.
ALLOWED: dict[str, tuple[str, ...]] = {
    "plugin_api": ("plugin_api",),
    "consul_backend": ("consul_backend",),
    "sidecar.engines": ("plugin_api", "sidecar.engines"),
    "sidecar.auth": ("plugin_api", "sidecar.auth"),
    "sidecar.hcl": ("sidecar.hcl",),
    "sidecar.config": ("sidecar.hcl", "sidecar.config"),
    "sidecar.cli": ("sidecar.cli", "sidecar.hcl", "sidecar.config", "sidecar.version"),
    "sidecar.cli.server": (
        "sidecar.cli",
        "sidecar.config",
        "sidecar.api.sockets",
        "sidecar.app",
        "sidecar.dev_tls",
        "sidecar.log_file",
    ),
    "sidecar.cli.diagnose": ("sidecar.cli", "sidecar.diagnose"),
    "sidecar.transport": ("consul_backend", "sidecar.transport"),
    "sidecar.mesh": ("consul_backend", "sidecar.mesh"),
    "sidecar.core": ("plugin_api", "consul_backend", "sidecar.core", "sidecar.hcl"),
    # What an auto seal is told is its stanza as it was read.
    "sidecar.core.seals": ("plugin_api", "consul_backend", "sidecar.core", "sidecar.config"),
    "sidecar.replication": ("plugin_api", "consul_backend", "sidecar.transport", "sidecar.replication"),
    "sidecar.request": ("plugin_api", "consul_backend", "sidecar.core", "sidecar.request", "sidecar.version"),
    "sidecar.api": (
        "plugin_api",
        "consul_backend",
        "sidecar.core",
        "sidecar.request",
        "sidecar.api",
        "sidecar.version",
    ),
    "sidecar": ("plugin_api", "consul_backend", "sidecar"),
}
# Only the command's own entry point may start the daemon.
WIRED_BY: dict[str, tuple[str, ...]] = {"sidecar.app": ("sidecar.__main__", "sidecar.cli.server", "sidecar.diagnose")}


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in ("plugin_api", "consul_backend", "sidecar"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.append((name.removesuffix(".__init__"), path))
    return found


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            module = node.module or ""
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names if (ROOT / module.replace(".", "/")).is_dir())
    return {name for name in names if name.split(".")[0] in OURS}


def within(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_one_way(name: str, path: Path) -> None:
    key = max((key for key in ALLOWED if within(name, (key,))), key=len)
    packages = {"sidecar"} if key.startswith("sidecar") else set()
    for imported in imports(path):
        if imported in packages:
            continue
        assert within(imported, ALLOWED[key]), f"{name} must not import {imported}"
        for target, users in WIRED_BY.items():
            assert not within(imported, (target,)) or name in users, f"{name} must not import {imported}"


def test_the_table_covers_every_package() -> None:
    assert {name.split(".")[0] for name, _ in modules()} == {"plugin_api", "consul_backend", "sidecar"}

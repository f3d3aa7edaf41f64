"""``docs/compatibility.md`` from the routing tables and from what a run of the tests has reached.

``--record`` runs the tests first and notes what they reach; without it the table is made from what
was noted last. ``--verify FOLDER`` compares a run of all tests with what the page claims.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sidecar.api.raw_paths import RAW_PATHS  # noqa: E402 - a script is started by its path
from tests.support.endpoints import (  # noqa: E402 - a script is started by its path
    CORE_GROUPS,
    FOLDER_VARIABLE,
    Described,
    Endpoint,
    endpoints_of,
    engine_endpoints,
    recorded,
)

PAGE = ROOT / "docs" / "compatibility.md"
REACHED = ROOT / "tests" / "data" / "endpoints_reached.json"
VAULT_ONLY = ROOT / "scripts" / "vault_only.txt"
FOLDER = ROOT / ".cache" / "endpoints"

# What an endpoint does less than Vault's, where it is served. ``*`` as verb stands for every one.
PARTLY: dict[tuple[str, str, str], str] = {
    ("sys", "POST", "plugins/catalog/{type}/{name}"): "refused: plugins run inside the server and come with it",
    ("sys", "GET", "internal/counters/activity"): "always 204: clients are not recorded",
    ("sys", "GET", "internal/counters/config"): "always off",
    ("sys", "GET", "internal/counters/entities"): "always 0: there is no identity engine",
    ("sys", "GET", "monitor"): "shows what the server logs itself; raise `sys/loggers` to see more",
    ("sys", "GET", "pprof/profile"): "folded stacks, not Go's format; likewise all of `pprof`",
    ("sys", "GET", "pprof/heap"): "only while Python traces memory",
    ("sys", "GET", "internal/ui/namespaces"): "the one namespace",
    ("auth/token", "POST", "create"): "no `entity_alias` before there is an identity engine",
}
HEAD = """# Compatibility with Vault's API

Made by `make compatibility` from the tables that requests are routed by and from a run of the tests; do not edit. A
test fails when it is stale, and a full run of the tests fails when an endpoint was not reached that this page calls
done.

* **done**: served, and a test gets an answer that is no error. The files that do are named.
* **partly**: served, with less than Vault has, or reached by no test.
* **not**: part of Vault's API, not served here.

PUT is POST everywhere, and `GET ?list=true` is LIST. Replication and the enterprise server's paths about it are served
too. The version in the answers is `1.15.0+outrider.` and our own, because clients compare it with Vault's; what it is
stands behind the plus sign. Two differences on purpose: an unknown parameter of a write is named in a warning even
where Vault answers 204, and a policy with an unknown key, a doubled attribute or a templated deny is refused instead
of taken.

"""

_UNRECORDED = "reached by no test"

Row = tuple[str, str, str, str]
"""(endpoint, state, tests, note)."""


async def core_paths() -> Described:
    """What the mounts of the core serve."""
    from tests.support.service_node import running

    found = []
    async with running() as node:
        for mount in CORE_GROUPS:
            backend = node.service.mounts.router.get(mount)
            assert backend is not None
            raw = (
                [replace(one, template=one.template.removeprefix(mount)) for one in RAW_PATHS]
                if mount == "sys/"
                else []
            )
            found.append((mount, [*raw, *backend.describe()]))
    return found


async def served_endpoints() -> list[Endpoint]:
    """Every endpoint of a node with every engine mounted."""
    found = engine_endpoints()
    for mount, descriptions in await core_paths():
        found += endpoints_of(CORE_GROUPS[mount], descriptions)
    return sorted(set(found))


def reached() -> dict[Endpoint, list[str]]:
    """What the last recorded run has reached."""
    rows = json.loads(REACHED.read_text()) if REACHED.exists() else []
    return {(group, verb, template): files for group, verb, template, files in rows}


def vault_only() -> list[tuple[Endpoint, str]]:
    """The list of what is not here."""
    lines = [line for line in VAULT_ONLY.read_text().splitlines() if line and not line.startswith("#")]
    return [((group, verb, template), why) for group, verb, template, why in (line.split("|") for line in lines)]


def page(served: list[Endpoint], hits: dict[Endpoint, list[str]]) -> str:
    """The whole page. Raises ValueError where the list of what is not here names something that is."""
    absent = vault_only()
    wrong = [endpoint for endpoint, _ in absent if endpoint in served]
    if wrong:
        raise ValueError(f"scripts/vault_only.txt names what is served: {wrong}")
    stale = sorted(set(PARTLY) - set(served))
    if stale:
        raise ValueError(f"scripts/compatibility.py has notes about what is not served: {stale}")
    groups: dict[str, list[Row]] = {}
    counts = {"done": 0, "partly": 0, "not": 0}
    for endpoint in served:
        state, note = _state(endpoint, hits)
        counts[state] += 1
        groups.setdefault(endpoint[0], []).append((_shown(endpoint), state, _files(hits.get(endpoint, [])), note))
    for endpoint, why in absent:
        counts["not"] += 1
        groups.setdefault(endpoint[0], []).append((_shown(endpoint), "not", "", why))
    text = HEAD + f"{counts['done']} done, {counts['partly']} partly, {counts['not']} not.\n"
    for group in sorted(groups):
        text += f"\n## {group}\n\n| endpoint | state | tests | note |\n| --- | --- | --- | --- |\n"
        text += "".join(f"| {' | '.join(row)} |\n" for row in groups[group])
    return text


def _state(endpoint: Endpoint, hits: dict[Endpoint, list[str]]) -> tuple[str, str]:
    if endpoint in PARTLY:
        return "partly", PARTLY[endpoint]
    return ("done", "") if endpoint in hits else ("partly", _UNRECORDED)


def _shown(endpoint: Endpoint) -> str:
    group, verb, template = endpoint
    return f"`{verb} {group if group.startswith('auth/') or group in ('sys', 'cubbyhole') else '…'}/{template}`"


def _files(files: list[str]) -> str:
    return ", ".join(Path(name).stem.removeprefix("test_") for name in files)


def record() -> None:
    """Run the tests, and keep what they reached."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "3", "--dist", "loadfile", "--no-loadscope-reorder", "tests"]
    command.append("--ignore=tests/unit/test_compatibility_page.py")  # it fails for as long as this is not done
    environment = {**os.environ, FOLDER_VARIABLE: str(FOLDER)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    rows = [[*endpoint, files] for endpoint, files in recorded(FOLDER, asyncio.run(core_paths())).items()]
    REACHED.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def verify(folder: Path) -> None:
    """Exits with 1 where the page claims what this run of all tests did not reach."""
    missing = sorted(set(reached()) - set(recorded(folder, asyncio.run(core_paths()))))
    if missing:
        print("docs/compatibility.md claims what no test reached; run make compatibility:", file=sys.stderr)
        for group, verb, template in missing:
            print(f"    {verb} {group}/{template}", file=sys.stderr)
        sys.exit(1)


def main(arguments: list[str]) -> None:
    """Write the page, or compare."""
    if arguments[:1] == ["--verify"]:
        verify(Path(arguments[1]))
        return
    if "--record" in arguments:
        record()
    PAGE.write_text(page(asyncio.run(served_endpoints()), reached()))
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The credentials engine for real processes: what is outside is a directory that the test shares with every node."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from plugin_api.errors import PluginError
from plugin_api.request import IssuedLease, Response
from tests.support.leasing_engine import TYPE, Credentials, Outside

ENVIRONMENT = "OUTRIDER_TEST_OUTSIDE"
_POLL_S = 0.05


class Directory(Outside):
    """``valid/`` has a file for each credential, ``calls`` a line for each call; ``hang`` holds calls up while it
    exists, ``fail`` makes them fail."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    async def revoke(self, credential: str) -> None:
        with (self.path / "calls").open("a") as calls:
            calls.write(f"{os.getpid()} {credential}\n")
        while (self.path / "hang").exists():  # noqa: ASYNC110 - another process changes it
            await asyncio.sleep(_POLL_S)
        if (self.path / "fail").exists():
            raise PluginError("the system outside is away")
        (self.path / "valid" / credential).unlink(missing_ok=True)


class FileCredentials(Credentials):
    """Issues files."""

    outside = Directory(Path(os.environ.get(ENVIRONMENT, "/nonexistent")))

    async def _issue(self, request, fields) -> Response:  # type: ignore[no-untyped-def]  # as the parent has it
        response = await super()._issue(request, fields)
        path = self.outside.path / "valid" / response.lease.internal["credential"]
        path.touch()
        return response

    async def revoke(self, lease: IssuedLease) -> None:
        await self.outside.revoke(lease.internal["credential"])


class Shared:
    """The test's side of it: the directory, and the environment that has nodes find the engine."""

    def __init__(self, home: Path, root: Path) -> None:
        self.path = home / "outside"
        (self.path / "valid").mkdir(parents=True)
        metadata = home / "plugins" / "credentials-1.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: credentials\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(
            f"[outrider.secrets]\n{TYPE} = tests.support.file_credentials:FileCredentials\n"
        )
        self.environment = {"PYTHONPATH": f"{root}:{metadata.parent}", ENVIRONMENT: str(self.path)}

    @property
    def valid(self) -> list[str]:
        return sorted(each.name for each in (self.path / "valid").iterdir())

    @property
    def calls(self) -> list[str]:
        found = self.path / "calls"
        return found.read_text().splitlines() if found.exists() else []

    def set(self, what: str, on: bool) -> None:
        """``hang`` or ``fail``."""
        (self.path / what).touch() if on else (self.path / what).unlink(missing_ok=True)

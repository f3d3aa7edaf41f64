"""``sys/seal``, ``sys/step-down``, key rotation, and a root token from key shares (contract 4.5, 4.7, 4.8)."""

from __future__ import annotations

from plugin_api.errors import InvalidRequest, ReadOnlyStorage
from plugin_api.formats import format_time
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.api.token_generation import TokenGeneration
from sidecar.core.rotation import RotationPolicy, rotate, rotation_policy, set_rotation_policy
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields


class SysSeal:
    """Handlers of one tenure. A root generation in progress ends with it."""

    def __init__(self, core: SysCore) -> None:
        self._core = core
        self._root_generation = TokenGeneration(
            "generate-root",
            core.sealed,
            core.random_bytes,
            self._issue_root,
            is_root=True,
            now=core.now,
            permitted=self._permitted,
        )

    def routes(self) -> list[Route]:
        """Rows of the table."""
        read, update = Operation.READ, Operation.UPDATE
        return [
            Route("seal", {update: self._seal}, sudo=True, help="Seal this node."),
            Route("step-down", {update: self._step_down}, sudo=True, help="Give up leadership."),
            Route("key-status", {read: self._key_status}, help="The active encryption key."),
            Route("rotate", {update: self._rotate}, sudo=True, help="Use a fresh encryption key from now on."),
            Route(
                "rotate/config",
                {read: self._rotate_config, update: self._set_rotate_config},
                help="When encryption keys are rotated by themselves.",
            ),
            *self._root_generation.routes(),
        ]

    async def _permitted(self, call: Call) -> bool:
        if not call.token:
            return False
        async with self._core.pipeline.identified(call):
            self._core.pipeline.authorize(call)
        return True

    async def _issue_root(self) -> str:
        return (await self._core.tokens.create_root()).token

    async def _seal(self, call: Call, params: Params) -> None:
        await self._core.node.seal()

    async def _step_down(self, call: Call, params: Params) -> None:
        await self._core.node.step_down()

    async def _key_status(self, call: Call, params: Params) -> Answer:
        active = self._core.sealed.barrier.ring("r").active
        return Answer(
            {
                "term": active.term,
                "install_time": format_time(active.install_time_s),
                "encryptions": self._core.sealed.barrier.encryptions("r"),
            }
        )

    async def _rotate(self, call: Call, params: Params) -> None:
        if not self._core.writable():
            raise InvalidRequest("cannot rotate on a replication secondary")
        for storage_class in ("r", "l"):
            await rotate(self._core.sealed, storage_class, self._core.now())

    async def _rotate_config(self, call: Call, params: Params) -> Answer:
        policy = await rotation_policy(self._core.sealed)
        interval = go_duration(policy.interval_s) if policy.interval_s else 0
        return Answer({"enabled": policy.enabled, "interval": interval, "max_operations": policy.max_operations})

    async def _set_rotate_config(self, call: Call, params: Params) -> None:
        if not self._core.writable():
            raise ReadOnlyStorage
        fields, old = Fields(call.data), await rotation_policy(self._core.sealed)
        policy = RotationPolicy(
            enabled=fields.boolean("enabled", old.enabled),
            interval_s=fields.duration_s("interval", old.interval_s),
            max_operations=fields.integer("max_operations", old.max_operations),
        )
        await set_rotation_policy(self._core.sealed, policy)


def go_duration(seconds: int) -> str:
    """As Go prints it: ``4320h0m0s``."""
    return f"{seconds // 3600}h{seconds // 60 % 60}m{seconds % 60}s"

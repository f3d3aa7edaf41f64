"""Which devices are at work, and when an entry counts as written.

A request goes on as soon as every device that keeps up has taken its entry, and at least one has. A device that hangs
or fails is waited for once; from then on, until it works again, only while no other device does. Nothing is waited for
longer than the bound: then the request fails. A device that this node cannot run fails every entry, so that alone it
stops all requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from plugin_api.errors import InvalidRequest, PluginError
from sidecar.core.audit.device import Device, Outcome
from sidecar.core.audit.entries import Formatting, Record, format_line, format_test
from sidecar.core.audit.hashing import Hasher
from sidecar.core.audit.options import LocalRules, formatting, make_sink
from sidecar.core.audit.sink import RefusedSink
from sidecar.core.audit.table import AuditEntry
from sidecar.core.metrics import METRICS

log = logging.getLogger("audit")

_THREAD_BYTES_MIN = 16 * 1024
_CLOSE_S = 0.25


_LATE = "nothing takes what is written"
_REQUEST, _RESPONSE = "log_request", "log_response"


def _give_up(future: asyncio.Future[Outcome]) -> None:
    if not future.done():
        future.set_result(_LATE)


def _timed_as(device: Device, kind: str) -> str:
    """The metric of one device, under Vault's name: with the slash that its path ends in."""
    return f"audit.{device.name}.{kind}"


def _sample_when_done(name: str, future: asyncio.Future[Outcome]) -> None:
    """Measure from now until the line is written or refused, also where nobody waits for it any more."""
    started_s = METRICS.monotonic()
    future.add_done_callback(lambda _: METRICS.sample(name, (METRICS.monotonic() - started_s) * 1000))


class AuditFailed(PluginError):
    """500: no device took the entry, so that the request must not go on, or its answer not be shown."""

    def __init__(self) -> None:
        super().__init__("internal error")


class AuditBroker:
    """The devices of one tenure. ``enabled`` says whether there is any."""

    def __init__(self, rules: LocalRules) -> None:
        self.enabled = False
        self._rules = rules
        self._devices: dict[str, Device] = {}
        self._entries: dict[str, AuditEntry] = {}
        self._leaving: set[asyncio.Future[Outcome]] = set()
        for kind in (_REQUEST, _RESPONSE):
            METRICS.counter(f"audit.{kind}_failure")  # there from the start: an alarm needs the 0 before the 1

    @property
    def blocked(self) -> bool:
        """Whether requests fail for want of a device that works, as far as the newest entry has shown."""
        return self.enabled and all(device.failing for device in self._devices.values())

    # -- devices

    async def trial(self, entry: AuditEntry, time_text: str, request_id: str) -> Device:
        """A device that has just taken a test entry; it is not at work yet. Raises InvalidRequest."""
        how = formatting(entry.options, entry.salt, self._rules)
        device = Device(entry.path, how, make_sink(entry.type, entry.options, self._rules))
        if entry.options.get("skip_test", "").lower() in ("1", "true"):
            return device
        outcome = await self._within_bound(device.submit(format_test(time_text, request_id, how.prefix)))
        if outcome is not None:
            self.dismiss(device)
            raise InvalidRequest(f"sanity check failed; unable to write to the audit device: {outcome}")
        return device

    def employ(self, entry: AuditEntry, device: Device) -> None:
        """Put a device to work."""
        self._devices[entry.uuid], self._entries[entry.uuid] = device, entry
        self.enabled = True
        log.info("audit device enabled: path=%s type=%s", entry.path, entry.type)

    def dismiss(self, device: Device) -> None:
        """Let go of a device; what was handed over to it before is written first."""
        future = device.close()
        self._leaving.add(future)
        future.add_done_callback(self._leaving.discard)

    def reconcile(self, entries: Sequence[AuditEntry]) -> None:
        """Bring the devices in line with the table. Opens nothing, so it cannot fail half-way: a device that this node
        cannot run is one that fails."""
        wanted = {entry.uuid: entry for entry in entries}
        for uuid in [uuid for uuid, entry in self._entries.items() if wanted.get(uuid) != entry]:
            del self._entries[uuid]
            device = self._devices.pop(uuid)
            self.dismiss(device)
            log.info("audit device disabled: path=%s", device.name)
        for entry in entries:
            if entry.uuid not in self._devices:
                self.employ(entry, self._make(entry))
        self.enabled = bool(self._devices)

    def _make(self, entry: AuditEntry) -> Device:
        try:
            how = formatting(entry.options, entry.salt, self._rules)
            return Device(entry.path, how, make_sink(entry.type, entry.options, self._rules))
        except InvalidRequest as error:
            log.error("audit device %s cannot work on this node: %s", entry.path, error)
            return Device(entry.path, Formatting(Hasher(entry.salt)), RefusedSink(str(error)))

    def reopen(self) -> None:
        """Every device lets go of its file or connection and opens it again, between two lines."""
        for device in self._devices.values():
            device.ask_to_reopen()

    async def close(self) -> None:
        """End every device, waiting shortly for what they still have to write. Entries fail from now on."""
        for device in self._devices.values():
            self.dismiss(device)
        if self._leaving:
            await asyncio.wait(set(self._leaving), timeout=_CLOSE_S)

    # -- entries

    async def write(self, record: Record) -> None:
        """Returns once the entry is written. Raises AuditFailed."""
        kind = _REQUEST if record.response is None else _RESPONSE
        with METRICS.timer(f"audit.{kind}"):
            good = await self._taken(record, kind)
        if not good:
            METRICS.increment(f"audit.{kind}_failure")
            log.error("audit: no device took an entry: request_id=%s", record.request.get("id"))
            raise AuditFailed

    async def _taken(self, record: Record, kind: str) -> bool:
        devices = list(self._devices.values())
        if not devices:
            return True  # the last one was disabled a moment ago
        if record.size_bytes < _THREAD_BYTES_MIN:
            lines = [format_line(record, device.how) for device in devices]
        else:
            lines = await asyncio.to_thread(lambda: [format_line(record, device.how) for device in devices])
        futures = [device.submit(line) for device, line in zip(devices, lines, strict=True)]
        if len(devices) == 1:
            with METRICS.timer(_timed_as(devices[0], kind)):
                return await self._written_by(devices[0], futures[0])
        for device, future in zip(devices, futures, strict=True):
            _sample_when_done(_timed_as(device, kind), future)
        return await self._written(devices, futures)

    async def _written_by(self, device: Device, future: asyncio.Future[Outcome]) -> bool:
        """:meth:`_written` where there is one device, as nearly everywhere, at a fraction of the cost."""
        late = asyncio.get_running_loop().call_later(self._rules.timeout_s, _give_up, future)
        try:
            outcome = await future
        finally:
            late.cancel()
        if outcome is _LATE:
            device.stall()
        return outcome is None

    async def _written(self, devices: Sequence[Device], futures: Sequence[asyncio.Future[Outcome]]) -> bool:
        deadline = time.monotonic() + self._rules.timeout_s
        while True:
            open_futures = [future for future in futures if not future.done()]
            good = any(future.done() and future.result() is None for future in futures)
            keeping_up = [future for device, future in zip(devices, futures, strict=True) if not device.failing]
            if not open_futures or (good and all(future.done() for future in keeping_up)):
                return good
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            await asyncio.wait(open_futures, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        for device, future in zip(devices, futures, strict=True):
            if not future.done():
                device.stall()
        return good

    async def _within_bound(self, future: asyncio.Future[Outcome]) -> Outcome:
        await asyncio.wait([future], timeout=self._rules.timeout_s)
        return future.result() if future.done() else _LATE

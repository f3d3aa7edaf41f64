"""Replication on real Consul: lag, throughput of the stream, catching up by log and by merkle tree, filling a fresh
secondary, and what 1, 10 and 50 secondaries cost their primary.

The primary is this process, with the load; a secondary is another one; each has a Consul server of its own. There is no
HTTP API in between, so a write is one ``commit`` of one entry at the primary's store. *Lag* is from its acknowledgement
until the secondary has applied it and readers there see it, for every single write, both on the machine's one
monotonic clock.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.replication_site import PARTITION, BenchStore, Child, bench_store, options, usage
from bench.report import percentile, result, table
from consul_backend.replicated import StoreOptions
from consul_backend.wal import Write
from sidecar.replication.activation import ActivationRequest, activate
from sidecar.replication.modes import PERFORMANCE
from sidecar.replication.roles import encode_role
from tests.support.consul_server import ConsulServer
from tests.support.replication_cluster import Cluster as Site
from tests.support.replication_cluster import Pair, PrimaryApi

VALUE_BYTES = 256
BATCH = 61
IN_STEP_S = 900.0


class World:
    """A primary, and Consul servers for it and for its secondaries."""

    def __init__(self, pair: Pair, store: BenchStore, other: ConsulServer) -> None:
        self.pair = pair
        self.store = store
        self._other = other
        self._children: list[Child] = []
        self._made = 0

    async def secondary(self) -> Child:
        """A fresh one in a process of its own: activated, not attached yet."""
        self._made += 1
        name = f"eu-{self._made}"
        fresh = await Site(f"{name}-fresh").start()
        await fresh.manager.secondary_enable("performance", await self.pair.token(name), "", "", "")
        await fresh.stop()
        entries = {key: base64.b64encode(raw).decode() for key, raw in fresh.flipped[0].entries.items()}
        asked = {
            "consul": self._other.address,
            "token": self._other.token,
            "path": f"outrider/{name}/",
            "entries": entries,
        }
        child = await Child.start("secondary", asked)
        self._children.append(child)
        return child

    async def thin(self, count: int) -> Child:
        """So many secondaries that keep nothing, in one process."""
        roles = []
        for _ in range(count):
            self._made += 1
            name = f"thin-{self._made}"
            made = await activate(
                PERFORMANCE,
                ActivationRequest(await self.pair.token(name)),
                store_id=f"store-{name}",
                now_s=time.time(),
            )
            roles.append(base64.b64encode(encode_role(made.role)).decode())
        child = await Child.start("thin", {"roles": roles})
        self._children.append(child)
        return child

    async def in_step(self, child: Child) -> dict[str, Any]:
        """Wait until it streams and has everything."""
        async with asyncio.timeout(IN_STEP_S):
            while True:
                state: dict[str, Any] = await child.do("state")
                if state.get("streams") and state["index"] >= self.store.head.index and state["last_sync"]:
                    return state
                await asyncio.sleep(0.05)

    async def forgotten(self, index: int) -> None:
        """Wait until the log no longer reaches back to a record."""
        async with asyncio.timeout(IN_STEP_S):
            while self.store.oldest_index <= index + 1:  # noqa: ASYNC110 - the log's collector has no event for it
                await asyncio.sleep(0.1)

    async def caught_up(self, thin: Child) -> None:
        """Wait until all of them have everything."""
        async with asyncio.timeout(IN_STEP_S):
            while min((await thin.do("state"))["indexes"]) < self.store.head.index:  # noqa: ASYNC110 - the other process answers, it does not call
                await asyncio.sleep(0.05)

    async def fill(self, keys: int, prefix: str) -> None:
        """New keys in full transactions."""
        value = os.urandom(VALUE_BYTES)
        at_once = asyncio.Semaphore(8)

        async def commit(start: int) -> None:
            async with at_once:
                writes = [Write(key_of(prefix, number), value) for number in range(start, min(start + BATCH, keys))]
                await self.store.commit(writes)

        async with asyncio.TaskGroup() as tasks:
            for start in range(0, keys, BATCH):
                tasks.create_task(commit(start))

    async def close(self) -> None:
        """Stop every process."""
        for child in self._children:
            await child.stop()


def key_of(prefix: str, number: int) -> str:
    """A new key, 1,000 to a folder."""
    return f"{PARTITION}/{prefix}/{number // 1000:04d}/key-{number:08d}"


@contextlib.asynccontextmanager
async def world(keep_records: int = 0) -> AsyncIterator[World]:
    """A primary that is enabled; ``keep_records`` is what its log keeps, 0 for everything."""
    with ConsulServer() as one, ConsulServer() as other:
        store_options = StoreOptions(
            wal_keep_records=keep_records or 10**6,
            wal_keep_bytes=2**40,
            collect_interval_s=0.5,
            segment_records=16 if keep_records else 512,
            ring_records_max=16 if keep_records else 4096,
        )
        async with bench_store(one.address, one.token, "outrider/us/", options=store_options) as store:
            api = PrimaryApi()
            await api.start()
            primary = await Site("us", store, options()).start()  # type: ignore[arg-type]  # a store by shape
            await primary.manager.primary_enable("performance", "")
            made = World(Pair(primary, api, []), store, other)
            gc.freeze()
            try:
                yield made
            finally:
                await made.close()
                await primary.stop()
                await api.stop()


async def steady(store: BenchStore, rate: float, seconds: float, prefix: str) -> tuple[dict[str, float], list[float]]:
    """Commit new keys at a steady rate: when each was acknowledged, and how long each took."""
    acknowledged: dict[str, float] = {}
    took_s: list[float] = []
    value = os.urandom(VALUE_BYTES)

    async def write(key: str, due: float) -> None:
        await store.commit([Write(key, value)])
        acknowledged[key] = time.monotonic()
        took_s.append(acknowledged[key] - due)

    started = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for number in range(int(rate * seconds)):
            due = started + number / rate
            if (pause_s := due - time.monotonic()) > 0:
                await asyncio.sleep(pause_s)
            tasks.create_task(write(key_of(prefix, number), due))
    return acknowledged, took_s


async def lag(arguments: argparse.Namespace) -> dict[str, Any]:
    """Acknowledged on the primary → applied on the secondary, at steady rates of new keys."""
    rows, figures = [], {}
    async with world() as made:
        child = await made.secondary()
        await child.do("attach")
        await made.in_step(child)
        for rate in arguments.rates:
            await child.do("applied")
            seconds = max(arguments.seconds, 10 / rate)
            before, before_there = usage(), await child.do("state")
            acknowledged, took_s = await steady(made.store, rate, seconds, f"lag-{rate:g}")
            await made.in_step(child)
            after, after_there = usage(), await child.do("state")
            applied = await child.do("applied")
            lags_s = [applied[key] - at for key, at in acknowledged.items()]
            cpu_us = [
                (b["cpu_s"] - a["cpu_s"]) / len(lags_s) * 1e6 for a, b in ((before, after), (before_there, after_there))
            ]
            shares = [percentile(samples, share) * 1e3 for samples in (lags_s, took_s) for share in (0.5, 0.99)]
            rows.append(
                [f"{rate:g}", f"{len(lags_s):,}", *(f"{one:.1f}" for one in shares), *(f"{one:.0f}" for one in cpu_us)]
            )
            names = ("lag_p50_ms", "lag_p99_ms", "write_p50_ms", "write_p99_ms")
            figures[f"{rate:g}"] = dict(zip(names, [round(one, 2) for one in shares], strict=True))
    table(
        ["writes/s", "writes", "lag p50 ms", "p99", "write p50 ms", "p99", "CPU µs/write, primary + load", "secondary"],
        rows,
    )
    return figures


async def stream(arguments: argparse.Namespace) -> dict[str, Any]:
    """How fast a stream goes when the writers do not wait for it: entries until the secondary has the last one."""
    async with world() as made:
        child = await made.secondary()
        await child.do("attach")
        await made.in_step(child)
        before, started = await child.do("state"), time.monotonic()
        await made.fill(arguments.entries, "stream")
        written_s = time.monotonic() - started
        after = await made.in_step(child)
        total_s = time.monotonic() - started
    entries = arguments.entries
    rows = [
        ["written on the primary", f"{written_s:.2f}", f"{entries / written_s:,.0f}"],
        ["applied on the secondary", f"{total_s:.2f}", f"{entries / total_s:,.0f}"],
    ]
    table(["stream", "s", "entries/s"], rows)
    cpu_us = (after["cpu_s"] - before["cpu_s"]) / entries * 1e6
    print(f"secondary: {cpu_us:.0f} µs of CPU an entry")
    return {"entries_per_s": round(entries / total_s), "written_per_s": round(entries / written_s)}


def synced(name: str, state: dict[str, Any], seconds: float) -> list[str]:
    """A row of a reconciliation."""
    last = state["last_sync"]
    keys = last["keys"]
    return [
        name,
        last["by"],
        f"{keys:,}",
        f"{seconds:.2f}",
        f"{keys / seconds:,.0f}",
        f"{last['bytes']:,}",
        f"{last['round_trips']}",
        f"{state['rss_mib']:.0f}",
    ]


SYNC_COLUMNS = ["case", "by", "keys", "s", "keys/s", "bytes", "round trips", "secondary MiB"]


async def catch_up(arguments: argparse.Namespace) -> dict[str, Any]:
    """A secondary that was away while so many keys were written: by the log, and by the tree when that is gone."""
    rows, figures = [], {}
    for keys in arguments.keys:
        for by, keep_records in (("wal", 0), ("merkle", 8)):
            async with world(keep_records) as made:
                child = await made.secondary()
                await made.fill(arguments.there, "there")
                await child.do("attach")
                await made.in_step(child)
                await child.do("detach")
                left_at = made.store.head.index
                if by == "merkle":
                    made.store.unhold("performance:eu-1")
                await made.fill(keys, "away")
                if by == "merkle":
                    await made.forgotten(left_at)
                started = time.monotonic()
                await child.do("attach")
                state = await made.in_step(child)
                seconds = time.monotonic() - started
                rows.append(synced(f"{keys:,} of {keys + arguments.there:,}", state, seconds))
                figures[f"{by}-{keys}"] = {"s": round(seconds, 2), "bytes": state["last_sync"]["bytes"]}
    table(SYNC_COLUMNS, rows)
    return figures


async def first_fill(arguments: argparse.Namespace) -> dict[str, Any]:
    """A fresh secondary, from its first hello until it streams."""
    rows, figures = [], {}
    for keys in arguments.keys:
        async with world() as made:
            began = time.monotonic()
            await made.fill(keys, "filled")
            own_s = time.monotonic() - began
            child = await made.secondary()
            before, started = usage(), time.monotonic()
            before_there = await child.do("attach")
            state = await made.in_step(child)
            seconds = time.monotonic() - started
            rows.append(synced(f"{keys:,} keys", state, seconds))
            here_us = (usage()["cpu_s"] - before["cpu_s"]) / keys * 1e6
            there_us = (state["cpu_s"] - before_there["cpu_s"]) / keys * 1e6
            print(f"CPU a key: primary {here_us:.0f} µs, secondary {there_us:.0f} µs;", end=" ")
            print(f"writing them to the primary's store took {own_s:.2f} s, {keys / own_s:,.0f} keys/s")
            ratio = round(own_s / seconds, 2)
            figures[str(keys)] = {"s": round(seconds, 2), "keys_per_s": round(keys / seconds), "of_own_writes": ratio}
    table(SYNC_COLUMNS, rows)
    return figures


async def fan_out(arguments: argparse.Namespace) -> dict[str, Any]:
    """What secondaries cost their primary: CPU and memory of its process, and the time of a write."""
    rows, figures = [], {}
    for count in arguments.secondaries:
        async with world() as made:
            child = await made.thin(count) if count else None
            gc.collect()
            before, cpu_before = usage(), resource.getrusage(resource.RUSAGE_SELF)
            _, took_s = await steady(made.store, arguments.rate, arguments.seconds, "fan")
            after, cpu_after = usage(), resource.getrusage(resource.RUSAGE_SELF)
            if child is not None:
                await made.caught_up(child)
            writes = len(took_s)
            cpu_us = (after["cpu_s"] - before["cpu_s"]) / writes * 1e6
            share = (after["cpu_s"] - before["cpu_s"]) / (writes / arguments.rate)
            p50_ms, p99_ms = (percentile(took_s, one) * 1e3 for one in (0.5, 0.99))
            switched = cpu_after.ru_nvcsw - cpu_before.ru_nvcsw
            rows.append(
                [
                    f"{count}",
                    f"{p50_ms:.1f}",
                    f"{p99_ms:.1f}",
                    f"{cpu_us:.0f}",
                    f"{share:.2f}",
                    f"{after['rss_mib'] - before['rss_mib']:.0f}",
                    f"{switched}",
                ]
            )
            figures[str(count)] = {
                "write_p50_ms": round(p50_ms, 2),
                "write_p99_ms": round(p99_ms, 2),
                "cpu_us": round(cpu_us),
            }
    table(["secondaries", "write p50 ms", "p99", "CPU µs/write", "cores", "MiB grown", "waits"], rows)
    return figures


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = parser.add_subparsers(dest="case", required=False)
    one = cases.add_parser("lag", help="acknowledged → applied, at steady rates")
    one.add_argument("--rates", type=float, nargs="+", default=[1, 200, 1000])
    one.add_argument("--seconds", type=float, default=5.0)
    one = cases.add_parser("stream", help="throughput of the stream")
    one.add_argument("--entries", type=int, default=50_000)
    one = cases.add_parser("catch-up", help="by log and by tree")
    one.add_argument("--keys", type=int, nargs="+", default=[10_000])
    one.add_argument("--there", type=int, default=10_000, help="keys that both have already")
    one = cases.add_parser("fill", help="a fresh secondary")
    one.add_argument("--keys", type=int, nargs="+", default=[10_000])
    one = cases.add_parser("fan-out", help="what N secondaries cost")
    one.add_argument("--secondaries", type=int, nargs="+", default=[0, 1, 10, 50])
    one.add_argument("--rate", type=float, default=50.0)
    one.add_argument("--seconds", type=float, default=5.0)
    functions = {"lag": lag, "stream": stream, "catch-up": catch_up, "fill": first_fill, "fan-out": fan_out}
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or else the Consul servers would stay
    figures: dict[str, Any] = {"load": [round(one, 1) for one in os.getloadavg()]}
    for case in [arguments.case] if arguments.case else functions:
        chosen = arguments if arguments.case else parser.parse_args([case])
        print(f"\n{case}: {(functions[case].__doc__ or '').splitlines()[0]}")
        figures[case] = asyncio.run(functions[case](chosen))
    result("replication", figures)


if __name__ == "__main__":
    main()

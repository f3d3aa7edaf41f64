"""The registry, both its forms, and what feeds it."""

import asyncio
import gc
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_backend.embedded import EmbeddedStore
from consul_backend.txn import Set
from sidecar.core.metrics import INTERVAL_S, Labelled, Metrics
from sidecar.gauges import role_gauges, store_gauges, store_totals
from sidecar.loop_lag import NAME, watch_loop_lag
from sidecar.measured_store import MeasuredStore
from sidecar.runtime_metrics import measured_collections, runtime_gauges, runtime_totals


class Time:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def make() -> tuple[Time, Metrics]:
    time = Time()
    return time, Metrics(time, lambda: 1_700_000_000.0)


def named(entries: list[dict], name: str) -> dict:
    (found,) = (entry for entry in entries if entry["Name"] == name)
    return found


def test_json_shows_the_last_whole_interval() -> None:
    time, metrics = make()
    for value in (1.0, 2.0, 6.0):
        metrics.sample("barrier.get", value)
    metrics.increment("quota", type="rate")
    running = metrics.as_json()
    assert running["Timestamp"] == "2023-11-14 22:13:20 +0000 UTC"
    sample = named(running["Samples"], "vault.barrier.get")
    assert (sample["Count"], sample["Sum"], sample["Min"], sample["Max"], sample["Mean"]) == (3, 9.0, 1.0, 6.0, 3.0)
    assert sample["Rate"] == 9.0 / INTERVAL_S
    assert math.isclose(sample["Stddev"], math.sqrt(7))
    assert named(running["Counters"], "vault.quota")["Labels"] == {"type": "rate"}
    time.now_s += INTERVAL_S
    metrics.sample("barrier.get", 100.0)
    assert named(metrics.as_json()["Samples"], "vault.barrier.get")["Max"] == 6.0
    time.now_s += INTERVAL_S
    assert named(metrics.as_json()["Samples"], "vault.barrier.get")["Max"] == 100.0
    time.now_s += INTERVAL_S
    assert metrics.as_json()["Samples"] == [], "nothing happened for a whole interval"
    assert metrics.as_json()["Points"] == []


def test_prometheus_shows_totals_and_quantiles() -> None:
    time, metrics = make()
    for value in range(1, 101):
        metrics.sample("wal.persistWALs", float(value))
    metrics.increment("core.response_status_code", code="200", type="2xx")
    time.now_s += 5 * INTERVAL_S
    metrics.increment("core.response_status_code", code="200", type="2xx")
    metrics.increment("core.response_status_code", code="404", type='4"x\\x\n')
    with metrics.source(lambda: {"core.active": 1.0, "a.b-c": 0.5}, lambda: {"cache.hit": 7.0}):
        text = metrics.as_prometheus()
    assert text.splitlines() == [
        "# TYPE vault_a_b_c gauge",
        "vault_a_b_c 0.5",
        "# TYPE vault_core_active gauge",
        "vault_core_active 1",
        "# TYPE vault_cache_hit counter",
        "vault_cache_hit 7",
        "# TYPE vault_core_response_status_code counter",
        'vault_core_response_status_code{code="200",type="2xx"} 2',
        'vault_core_response_status_code{code="404",type="4\\"x\\\\x\\n"} 1',
        "# TYPE vault_wal_persistWALs summary",
        'vault_wal_persistWALs{quantile="0.5"} 51',
        'vault_wal_persistWALs{quantile="0.9"} 91',
        'vault_wal_persistWALs{quantile="0.99"} 100',
        "vault_wal_persistWALs_sum 5050",
        "vault_wal_persistWALs_count 100",
    ]
    assert "core_active" not in metrics.as_prometheus(), "a source is asked while its block runs"


def test_a_timer_counts_failures_too() -> None:
    time, metrics = make()

    def fail() -> None:
        with metrics.timer("x"):
            time.now_s += 0.25
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert named(metrics.as_json()["Samples"], "vault.x")["Sum"] == 250.0


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 30)), max_size=40))
def test_totals_are_never_lost(steps: list[tuple[float, float]]) -> None:
    time, metrics = make()
    for value, pause_s in steps:
        metrics.sample("x", value)
        time.now_s += pause_s
        metrics.as_json()
    text = metrics.as_prometheus()
    if steps:
        assert f"vault_x_count {len(steps)}" in text
        total = float(text.partition("vault_x_sum ")[2].split()[0])
        assert math.isclose(total, sum(value for value, _ in steps), rel_tol=1e-9, abs_tol=1e-9)


async def test_the_store_is_timed() -> None:
    _, metrics = make()
    store = MeasuredStore(EmbeddedStore(None), metrics)
    await store.open()
    try:
        await store.txn([Set("a", b"1")])
        assert (await store.get("a", consistent=True)).value == b"1"
        assert await store.list("") == ["a"]
        assert (await store.get_many(["a", "b"]))[1] is None
        session = await store.create_session("n", beat_ttl_s=5, lock_delay_s=0.1)
        assert await store.renew_session(session)
        await store.beat()
        await store.destroy_session(session)
        await store.stop_beat()
        assert store.kind == "inmem"
        assert store.limits.ops_max > 0
    finally:
        await store.close()
    counts = {entry["Name"]: entry["Count"] for entry in metrics.as_json()["Samples"]}
    assert counts == {
        "vault.consul.beat": 1,
        "vault.consul.get": 2,
        "vault.consul.list": 1,
        "vault.consul.session": 3,
        "vault.consul.transaction": 1,
    }


async def test_a_blocked_loop_is_seen() -> None:
    metrics = Metrics()
    task = asyncio.create_task(watch_loop_lag(metrics, period_s=0.01))
    loop = asyncio.get_running_loop()
    await asyncio.sleep(0)
    end = loop.time() + 0.06
    while loop.time() < end:
        pass
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert named(metrics.as_json()["Samples"], f"vault.{NAME}")["Max"] >= 40


def test_gauges_have_the_names_of_the_telemetry() -> None:
    roles = role_gauges(unsealed=True, active=True, performance_mode="secondary", dr_mode="disabled")
    assert (roles["core.active"], roles["core.unsealed"]) == (1, 1)
    assert (
        roles["core.replication.performance.primary"],
        roles["core.replication.performance.secondary"],
    ) == (0, 1)
    statistics = {"wal_head_index": 10, "wal_oldest_index": 4, "index_dirty_extents": 3, "cache_hits": 8, "other": 1}
    primary = store_gauges(statistics, ("primary", "disabled"), None)
    assert primary["replication.wal.last_wal"] == primary["replication.wal.last_performance_wal"] == 10
    assert (primary["wal.gc.total"], primary["merkle.flushDirty.outstanding_pages"]) == (7, 3)
    assert store_gauges(statistics, ("secondary", "disabled"), 6)["replication.fsm.last_remote_wal"] == 6
    assert "replication.fsm.last_remote_wal" not in store_gauges(statistics, ("secondary", "disabled"), None)
    assert store_totals(statistics) == {"cache.hit": 8}


def test_gauges_can_have_labels() -> None:
    _, metrics = make()

    def gauges() -> dict[str, float]:
        kinds = ("logical", "auth")
        entries = {Labelled("core.mount_table.num_entries", type=kind, local="false"): 2.0 for kind in kinds}
        return {**entries, "core.active": 1.0}

    with metrics.source(gauges):
        shown = metrics.as_json()["Gauges"]
        text = metrics.as_prometheus()
    assert [(gauge["Name"], gauge["Labels"]) for gauge in shown] == [
        ("vault.core.active", {}),
        ("vault.core.mount_table.num_entries", {"local": "false", "type": "auth"}),
        ("vault.core.mount_table.num_entries", {"local": "false", "type": "logical"}),
    ]
    assert text.splitlines()[2:] == [
        "# TYPE vault_core_mount_table_num_entries gauge",
        'vault_core_mount_table_num_entries{local="false",type="auth"} 2',
        'vault_core_mount_table_num_entries{local="false",type="logical"} 2',
    ]


async def test_what_the_process_costs() -> None:
    waiting = asyncio.create_task(asyncio.sleep(60))
    before = runtime_gauges()
    assert before["runtime.num_goroutines"] >= 3, "this test, the one that waits, and a thread"
    assert before["runtime.sys_bytes"] > before["runtime.alloc_bytes"] > 2**20
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert runtime_gauges()["runtime.num_goroutines"] == before["runtime.num_goroutines"] - 1
    _, metrics = make()
    runs = runtime_totals()["runtime.total_gc_runs"]
    with measured_collections(metrics):
        gc.collect()
    gc.collect()
    assert runtime_totals()["runtime.total_gc_runs"] >= runs + 2
    assert named(metrics.as_json()["Samples"], "vault.runtime.gc_pause_ns")["Count"] >= 1

"""A cluster on a real Consul whose every transaction is kept and whose every client is judged."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from tests.sim.checkers import Exemption
from tests.sim.history import History
from tests.support.cluster import Cluster, Node, consul_storage, ready
from tests.support.consul_server import ConsulServer
from tests.support.consul_tap import ConsulTap
from tests.support.faults import mount_load
from tests.support.traffic import Traffic
from tests.support.verdict import Verdict, judge, load_mount_uuid

BEAT_TTL_S = 4
"""Short enough to wait for, and long enough that a busy machine does not end a tenure that the test did not end."""
SETTINGS = (
    f'sidecar {{\n  beat_ttl = "{BEAT_TTL_S}s"\n  beat_interval = "300ms"\n'
    '  step_down_grace = "300ms"\n  flush_interval = "50ms"\n}\n'
)


class Site:
    """One node for each of ``agents``, the Consul server that it talks to through a tap of its own.

    ``gaps`` collects, by fault, for how long no write was acknowledged.
    """

    def __init__(self, home: Path, agents: Sequence[ConsulServer], *, settings: str = SETTINGS) -> None:
        self.prefix = f"outrider/{uuid.uuid4().hex[:8]}/"
        self.agents = list(agents)
        self.taps = [ConsulTap(f"node-{n}", agent.address) for n, agent in enumerate(agents)]
        nodes = [
            Node(
                tap.name,
                home,
                consul_storage(tap.address, agent.token, self.prefix),
                settings=settings,
            )
            for tap, agent in zip(self.taps, agents, strict=True)
        ]
        self.cluster = Cluster(nodes)
        self.histories: list[History] = []
        self.exempt: list[Exemption] = []
        self.gaps: dict[str, float] = {}
        self._mount_uuid = ""

    def __enter__(self) -> Site:
        try:
            self.cluster.bootstrap()
            mount_load(self.cluster.call)
            self._mount_uuid = load_mount_uuid(self.cluster)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Kill the nodes and end the taps."""
        self.cluster.kill()
        for tap in self.taps:
            tap.close()

    def tap_of(self, node: Node) -> ConsulTap:
        """What ``node`` reaches Consul through."""
        return self.taps[self.cluster.nodes.index(node)]

    def agent_of(self, node: Node) -> ConsulServer:
        """The Consul server that ``node`` talks to."""
        return self.agents[self.cluster.nodes.index(node)]

    def traffic(self, **options: int | float) -> Traffic:
        """Clients of every node, to be judged with the rest."""
        traffic = Traffic(self.cluster.nodes, self.cluster.root_token, **options)  # type: ignore[arg-type]  # passed on as it came
        self.histories.append(traffic.history)
        return traffic

    def whole(self) -> None:
        """Have every node run, unsealed, and one of them lead, whatever was left behind."""
        for tap in self.taps:
            tap.clear()
            tap.heal()
        for node in self.cluster.nodes:
            if not node.running:
                node.environment = {}
                node.start()
        for node in self.cluster.nodes:
            node.wait_until("be unsealed", lambda node=node: not node.unseal(self.cluster.keys).body["sealed"])
        self.cluster.wait_active()
        for node in self.cluster.nodes:
            node.wait_until("be there", lambda node=node: ready(node))

    @contextlib.contextmanager
    def exempted(self, after_s: float) -> Iterator[None]:
        """Reads within the block and for so long after it are not judged: its fault is outside what they promise."""
        began_s = time.monotonic()
        yield
        self.exempt.append(Exemption(began_s, time.monotonic() + after_s))

    def lock(self) -> dict[str, object]:
        """The lock key's row as Consul has it."""
        rows = self.agents[0].call("GET", f"kv/{self.prefix}lock").json
        return dict(rows[0])

    def verdict(self, server: ConsulServer | None = None) -> Verdict:
        """Stop the nodes and judge everything since the beginning."""
        self.cluster.stop()
        return judge(
            server or self.agents[0],
            self.cluster,
            self.prefix,
            self.taps,
            self.histories,
            self._mount_uuid,
            self.exempt,
        )

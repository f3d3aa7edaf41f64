"""One real Consul per test process (so per xdist worker), and stores on it that cannot see each other."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

from consul_backend.config import ConsulConfig
from consul_backend.errors import BackendError
from consul_backend.store import ConsulStore
from tests.support.consul_server import ConsulServer
from tests.support.endpoints import install_recorder

ConsulStoreFactory = Callable[..., Awaitable[ConsulStore]]

install_recorder()

# Nodes inherit this environment, and a seal obeys VAULT_ADDR before its own stanza: drop what a shell has set.
for name in [name for name in os.environ if name.startswith(("VAULT_", "OUTRIDER_ADDR", "OUTRIDER_TOKEN"))]:
    del os.environ[name]

# How long an example takes says how loaded the machine is.
settings.register_profile("timeless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("timeless")


@pytest.fixture(scope="session")
def consul_server() -> Iterator[ConsulServer]:
    """Shared by all tests of this process: do not stop it (see ``own_consul_server``)."""
    with ConsulServer() as server:
        yield server


@pytest.fixture
def own_consul_server() -> Iterator[ConsulServer]:
    """A server of this test alone, to be killed, frozen and restarted."""
    with ConsulServer() as server:
        yield server


@pytest.fixture
def consul_path() -> str:
    """A key prefix that no other test uses, within the least-privilege policy."""
    return f"outrider/{uuid.uuid4().hex[:12]}/"


@pytest.fixture
async def consul_store_factory(consul_server: ConsulServer, consul_path: str) -> AsyncIterator[ConsulStoreFactory]:
    """``await factory(path=…, token=…)``: an open ConsulStore; the stores of one test share a prefix unless told."""
    stores: list[ConsulStore] = []

    async def make(*, path: str = consul_path, token: str = "") -> ConsulStore:
        config = ConsulConfig(address=consul_server.address, token=token or consul_server.token, path=path)
        store = ConsulStore(config)
        stores.append(store)
        await store.open()
        return store

    yield make
    for store in stores:
        with contextlib.suppress(BackendError):
            await store.stop_beat()
        await store.close()

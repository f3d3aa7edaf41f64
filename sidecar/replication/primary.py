"""What a primary of either mode offers on the cluster port, for as long as :meth:`PrimaryService.run` runs.

=================  ====================================================  ===========================================
``POST /bootstrap``  keys for a new secondary                              certificate known, not connected yet
``GET /stream``      websocket: hello, then the write-ahead log            certificate and store known; pins the store
``POST /alive``      nothing, to whoever wonders                           certificate known
``POST /diff``       first round trip of a merkle sync                     pinned
``POST /fetch``      second round trip                                     pinned
``POST /forward``    a request of the secondary's clients                  pinned, performance only
=================  ====================================================  ===========================================

The listener has checked that the client certificate is on the allow list before any of these runs, per connection and
per request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web

from consul_backend.clock import SteadyTime
from consul_backend.errors import BackendError
from consul_backend.failpoint import failpoint
from consul_backend.position import Position
from plugin_api.errors import InvalidRequest, PermissionDenied, Unavailable
from sidecar.replication import protocol
from sidecar.replication.activation import BOOTSTRAP_PATH, VERSIONS, BootstrapReply, BootstrapRequest
from sidecar.replication.allow_list import claim_store, connect
from sidecar.replication.answers import SelectionChanged, answer_diff, answer_fetch
from sidecar.replication.certifying import (
    CERTIFICATE_BYTES_MAX,
    CERTIFICATE_PATH,
    CertificateRequest,
    Certifier,
    ChangeRole,
)
from sidecar.replication.channel import ChannelClosed, WebSocketChannel
from sidecar.replication.denials import Denied, unheard
from sidecar.replication.hello import Source
from sidecar.replication.modes import PERFORMANCE, Mode
from sidecar.replication.protocol import HelloReply, ProtocolViolation
from sidecar.replication.roles import KnownSecondary, PrimaryRole
from sidecar.replication.shipped import Shipped
from sidecar.replication.shipper import Advertised, Select, Shipper, ShipperOptions
from sidecar.replication.wiring import ReplicationOptions, Wiring
from sidecar.transport.forwarding import (
    FORWARD_PATH,
    REQUEST_BYTES_MAX,
    ForwardRequest,
    ForwardResponse,
    MalformedMessage,
    decode,
    encode,
)
from sidecar.transport.listener import Purpose, peer_of
from sidecar.transport.trail import UPWARD, LoopRefused, arrived

logger = logging.getLogger(__name__)

STREAM_PATH = "/stream"
ALIVE_PATH = "/alive"
DIFF_PATH = "/diff"
FETCH_PATH = "/fetch"
BOOTSTRAP_REQUEST_BYTES_MAX = 64 * 1024
HELLO_TIMEOUT_S = 10.0
FAREWELL_S = 0.5
DRAIN_POLL_S = 0.02
FOLLOWED_WAIT_S = 5.0
LACKING_WAIT_S = 2.0


class PrimaryService:
    """Serves the secondaries of one set during one tenure. ``newest`` returns the newest committed role of that set,
    None when there is none any more; activations live by ``steady``; ``change`` commits a change of the role: applied
    to the newest one, one change at a time; ``select`` what may travel to a secondary now; ``serving`` is set while the
    cluster port offers this; ``denied`` hears of secondaries that deny this cluster's log."""

    def __init__(
        self,
        mode: Mode,
        wiring: Wiring,
        role: PrimaryRole,
        *,
        newest: Callable[[], PrimaryRole | None],
        steady: SteadyTime,
        select: Select,
        change: ChangeRole,
        serving: asyncio.Event,
        denied: Denied = unheard,
    ) -> None:
        self._mode = mode
        self._store = wiring.store
        self._listener = wiring.listener
        self._node = wiring.node
        self._callbacks = wiring.callbacks
        self._clock = wiring.clock
        self._steady = steady
        self._role = role
        self._newest = newest
        self._select = select
        self._change = change
        self._denied = denied
        self.serving = serving
        self.source = Source(
            wiring.node.local_cluster_id,
            role.set_id,
            wiring.store.generation,
            role.epoch.number,
            role.epoch.id,
            role.history,
        )
        options = wiring.options
        self.shipper = self._make_shipper(options)
        self.certifier = Certifier(
            mode,
            wiring.listener,
            wiring.clock,
            newest=newest,
            change=change,
            certificate_ttl_s=options.certificate_ttl_s,
            check_s=options.certificate_check_s,
        )
        self._silence_s = options.beat_s * options.silent_beats_max
        self._seen_at_s: dict[str, float] = {}
        self._streams: dict[str, asyncio.Event] = {}
        self._handlers: dict[tuple[str, str], Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]] = {
            ("POST", BOOTSTRAP_PATH): self._bootstrap,
            ("GET", STREAM_PATH): self._stream,
            ("POST", ALIVE_PATH): self._alive,
            ("POST", DIFF_PATH): self._diff,
            ("POST", FETCH_PATH): self._fetch,
            ("POST", CERTIFICATE_PATH): self._certificate,
        }
        if mode is PERFORMANCE:  # a DR secondary forwards nothing
            self._handlers["POST", FORWARD_PATH] = self._forward

    def _make_shipper(self, options: ReplicationOptions) -> Shipper:
        return Shipper(
            self._mode,
            self._store,
            self.source,
            ShipperOptions(
                beat_s=options.beat_s,
                silent_beats_max=options.silent_beats_max,
                limits=options.limits,
                window_records=options.window_records,
                window_bytes=options.window_bytes,
            ),
            self._clock,
            advertise=self._advertised,
            select=self._select,
            denied=self._denied,
        )

    async def run(self) -> None:
        """Serve until cancelled; then the purpose is withdrawn and every stream cut."""
        await self._store.rooted()
        role = self._role
        for secondary_id in role.secondaries:
            self.shipper.expect(secondary_id)
        name = self._mode.server_name(role.set_id)
        credentials = await self.certifier.credentials(role)
        self._listener.add(
            Purpose(
                sni=name,
                alpn=self._mode.alpn,
                credentials=credentials,
                trust_root_pem=role.trusted_pem,
                handler=self._dispatch,
                allow=self._allow,
            )
        )
        self.serving.set()
        try:
            await self.certifier.run()
        finally:
            self.serving.clear()
            await self._listener.remove(name)

    async def drained(self) -> None:
        """Wait until every secondary that is there has everything; cancel it when that takes too long. One that was
        heard of within the silence that ends a stream is there: it may be on its way from a sync to its stream."""
        await self._none_behind(self._store.head.index)

    async def _none_behind(self, index: int) -> None:
        while self.behind(index):  # noqa: ASYNC110 - acknowledgements of many streams, for seconds at most
            await asyncio.sleep(DRAIN_POLL_S)

    async def lacking(self, index: int) -> list[str]:
        """The ids of all known secondaries that do not have record ``index``; connected ones get a moment for it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LACKING_WAIT_S):
                await self._none_behind(index)
        role = self._newest()
        known = sorted(role.secondaries) if role is not None else []
        return [name for name in known if name not in self.shipper.peers or self.shipper.peers[name].applied < index]

    async def followed(self) -> None:
        """:meth:`drained`, for a moment: those that are there should know what is relied upon next."""
        try:
            async with asyncio.timeout(FOLLOWED_WAIT_S):
                await self.drained()
        except TimeoutError:
            late = ", ".join(self.behind(self._store.head.index))
            logger.warning("replication: %s secondaries do not have the newest role yet: %s", self._mode.name, late)

    def behind(self, head_index: int) -> list[str]:
        """The ids of those secondaries that do not have record ``head_index`` yet."""
        since_s = self._clock.monotonic() - self._silence_s
        return [
            name
            for name, peer in self.shipper.peers.items()
            if peer.applied < head_index
            and name not in self.shipper.forks
            and (peer.connected or self._seen_at_s.get(name, since_s) > since_s)
        ]

    async def dismiss(self, secondary_id: str, fingerprints: Sequence[str]) -> None:
        """After the role without it was committed: tell it, briefly, and cut what is open with its certificates."""
        self.shipper.forget(secondary_id)
        self._seen_at_s.pop(secondary_id, None)
        try:
            async with asyncio.timeout(FAREWELL_S):
                for ended in [self._streams[one] for one in fingerprints if one in self._streams]:
                    await ended.wait()
        except TimeoutError:
            logger.info("replication: secondary %s did not take its farewell", secondary_id)
        finally:
            for one in fingerprints:
                self._listener.cut(one)

    def _allow(self, fingerprint: str) -> bool:
        return self._known(fingerprint) is not None

    def _known(self, fingerprint: str) -> KnownSecondary | None:
        role = self._newest()
        return role.by_fingerprint(fingerprint) if role is not None else None

    def _advertised(self) -> Advertised:
        return Advertised(self._node.api_addr, tuple(self._node.cluster_addresses()))

    async def _dispatch(self, request: web.BaseRequest) -> web.StreamResponse:
        handler = self._handlers.get((request.method, request.path))
        if handler is None:
            return web.Response(status=404, text="no such call on this protocol")
        try:
            return await handler(request)
        except (ProtocolViolation, MalformedMessage) as error:
            return web.Response(status=400, text=str(error))
        except (PermissionDenied, InvalidRequest) as error:
            if request.path == BOOTSTRAP_PATH:  # a copied or replayed activation: somebody should look
                peer = peer_of(request)
                logger.warning(
                    "security: an activation was refused: %s (id %s, certificate %s, from %s)",
                    error,
                    peer.common_name,
                    peer.fingerprint,
                    peer.address,
                )
            return web.Response(status=403, text=str(error))

    def _pinned(self, request: web.BaseRequest) -> KnownSecondary:
        known = self._known(peer_of(request).fingerprint)
        if known is None or not known.connected:
            raise PermissionDenied("say hello on a stream first")
        self._seen_at_s[known.id] = self._clock.monotonic()
        return known

    async def _bootstrap(self, request: web.BaseRequest) -> web.StreamResponse:
        asked = decode(await request.read(), BootstrapRequest, bytes_max=BOOTSTRAP_REQUEST_BYTES_MAX)
        fingerprint = peer_of(request).fingerprint
        version = max(set(asked.versions) & set(VERSIONS), default=0)
        if not version:
            raise PermissionDenied("no common protocol version: upgrade the secondary first")
        now_ms = self._steady.time_ms()
        try:
            role = await self._change(
                lambda newest: claim_store(
                    self._mode, newest, fingerprint, asked.set_id, asked.epoch, asked.store_id, now_ms=now_ms
                ),
            )
            material = await self._callbacks.secret_material(self._mode.keyrings)
        except (BackendError, Unavailable) as error:
            return web.Response(status=503, text=str(error))
        reply = BootstrapReply(
            version=version,
            set_id=role.set_id,
            epoch=role.epoch,
            root_key=material.root_key,
            keyrings=dict(material.keyrings),
            seal=material.seal,
            api_addr=self._node.api_addr,
            cluster_addrs=tuple(self._node.cluster_addresses()),
            history=role.history,
        )
        failpoint("activation:before-reply")
        logger.info("replication: secondary %s received its keys", asked.secondary_id)
        return _binary(encode(reply))

    async def _stream(self, request: web.BaseRequest) -> web.StreamResponse:
        fingerprint = peer_of(request).fingerprint
        channel = await WebSocketChannel.accept(request)
        ended = self._streams[fingerprint] = asyncio.Event()
        reason = "this primary ended the stream"
        try:
            reason = await self._serve_stream(channel, fingerprint)
        finally:
            ended.set()
            if self._streams.get(fingerprint) is ended:
                del self._streams[fingerprint]
            await channel.close(reason)
        return channel.socket  # type: ignore[return-value]  # accept() made the server's kind

    async def _serve_stream(self, channel: WebSocketChannel, fingerprint: str) -> str:
        """Hello, and what follows; returns why it ended.

        Only a secondary that is wrong for this set is *refused*, since it then rests until an operator acts. One that
        meets a primary on its way out is not: it comes again.
        """
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = protocol.decode_hello(await channel.recv())
            known = self._known(fingerprint)
            if self._newest() is not None and (known is None or known.id != hello.secondary_id):
                raise PermissionDenied("the hello names another secondary than the certificate does, or it was revoked")
            await self._change(lambda newest: connect(self._mode, newest, fingerprint, hello.set_id, hello.store_id))
            if known is not None and fingerprint != known.fingerprint:
                failpoint("certificate:after-use")
                self.certifier.replaced([known.fingerprint])
                self.certifier.wake()
            self._seen_at_s[hello.secondary_id] = self._clock.monotonic()
            return await self.shipper.serve(channel, hello)
        except PermissionDenied as refusal:
            await self._refuse(channel, str(refusal))
            return str(refusal)
        except (ChannelClosed, ProtocolViolation, BackendError, InvalidRequest, TimeoutError) as error:
            return str(error) or "no hello in time"

    async def _refuse(self, channel: WebSocketChannel, reason: str) -> None:
        head, source = self._store.head, self.source
        reply = HelloReply(
            version=protocol.PROTOCOL_VERSIONS[-1],
            mode="refuse",
            reason=reason,
            cluster_id=source.cluster_id,
            set_id=source.set_id,
            generation=source.generation,
            epoch=source.epoch,
            epoch_id=source.epoch_id,
            head_index=head.index,
            head_hash=head.chain_hash,
            ops_max=0,
            body_bytes_max=0,
            prefix_bytes=0,
            history=source.history,
        )
        try:
            await channel.send(protocol.encode(reply))
        except ChannelClosed:
            return

    async def _alive(self, request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        return web.Response(status=204)

    async def _certificate(self, request: web.BaseRequest) -> web.StreamResponse:
        known = self._pinned(request)
        asked = decode(await request.read(), CertificateRequest, bytes_max=CERTIFICATE_BYTES_MAX)
        try:
            return _binary(encode(await self.certifier.answer(peer_of(request).fingerprint, known, asked)))
        except (BackendError, Unavailable) as error:
            return web.Response(status=503, text=str(error))

    async def _diff(self, request: web.BaseRequest) -> web.StreamResponse:
        known = self._pinned(request)
        asked = protocol.decode_diff_request(await request.read())
        try:
            reply = await answer_diff(
                self._store,
                self.source,
                asked,
                mode=self._mode,
                hold_as=self.shipper.hold_name(known.id),
                selected=lambda: self._select(known.id),
            )
        except SelectionChanged as error:
            return web.Response(status=409, text=str(error))
        except BackendError as error:
            return web.Response(status=503, text=str(error))
        return _binary(protocol.encode(reply))

    async def _fetch(self, request: web.BaseRequest) -> web.StreamResponse:
        known = self._pinned(request)
        asked = protocol.decode_fetch_request(await request.read())
        shipped = Shipped(self._store.forest, self._mode.classes, asked.selection)
        for name in asked.partitions:
            shipped.resolve(name)
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        await response.prepare(request)
        async with contextlib.aclosing(
            answer_fetch(self._store, asked, mode=self._mode, selected=lambda: self._select(known.id))
        ) as chunks:
            try:
                async for chunk in chunks:
                    await response.write(chunk)
                await response.write_eof()
            except ConnectionError:
                logger.info("replication: secondary %s went away in the middle of its merkle sync", known.id)
        return response

    async def _forward(self, request: web.BaseRequest) -> web.StreamResponse:
        known = self._pinned(request)
        asked = decode(await request.read(), ForwardRequest, bytes_max=REQUEST_BYTES_MAX)
        if asked.auth is None:
            raise PermissionDenied("a forwarded request must say who its caller is")
        try:
            arrived(asked.trail, self._node.local_cluster_id, UPWARD)
        except LoopRefused as refusal:
            return web.Response(status=503, text=str(refusal))
        try:
            done = await self._callbacks.execute(asked)
        except Unavailable as refusal:  # this node is handing over: nothing has run
            return web.Response(status=503, text=str(refusal))
        logger.debug("replication: %s %s for secondary %s: %d", asked.method, asked.path, known.id, done.status)
        return _binary(encode(ForwardResponse(done.status, list(done.headers), done.body, self._at(done.wal_index))))

    def _at(self, index: int) -> Position | None:
        if not index:
            return None
        head = self._store.head
        chain_hash = head.chain_hash if head.index == index else b""  # a forwarder waits for the index alone
        return Position(self.source.set_id, self._store.generation, self.source.epoch, index, chain_hash)


def _binary(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/octet-stream")

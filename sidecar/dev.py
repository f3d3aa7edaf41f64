"""``outrider server -dev``: initialised, unsealed and with a KV engine, in memory, for trying things out."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from typing import Any

from multidict import CIMultiDict

from plugin_api.errors import InvalidRequest
from sidecar.api.front import Front
from sidecar.api.node_view import InitOptions
from sidecar.config import DevOptions, ServerConfig
from sidecar.node import Node
from sidecar.request.types import HttpRequest
from sidecar.version import product

_TOKEN_ID = re.compile(r"[^\s\x00-\x1f\x7f]+\Z")


@dataclass(frozen=True, slots=True)
class DevSecrets:
    """What a developer needs and sees once."""

    unseal_key: str = field(repr=False)
    root_token: str = field(repr=False)


class DevServer:
    """Prepares a node that was just started on empty storage, by the requests an operator would make."""

    def __init__(self, node: Node, front: Front) -> None:
        self._node = node
        self._front = front

    async def prepare(self, dev: DevOptions) -> DevSecrets:
        """Initialise, unseal, mount ``secret/``. Raises InvalidRequest when a step is refused."""
        if dev.root_token_id and not _TOKEN_ID.match(dev.root_token_id):
            raise InvalidRequest("-dev-root-token-id must not contain blanks or control characters")
        sealing = self._node.sealing
        outcome = await sealing.init(InitOptions(shares=1, threshold=1), root_token=dev.root_token_id)
        await sealing.unseal(outcome.keys[0])
        token = outcome.root_token
        if dev.kv_version:
            about = {"options": {"version": dev.kv_version}, "description": "key/value secret storage"}
            await self._post("sys/mounts/secret", token, {"type": "kv", **about})
        return DevSecrets(base64.b64encode(outcome.keys[0]).decode(), token)

    async def _post(self, path: str, token: str, body: dict[str, Any]) -> None:
        headers = CIMultiDict({"X-Vault-Token": token})
        answer = await self._front.handle(
            HttpRequest("POST", path, headers=headers, body=json.dumps(body).encode(), remote_address="127.0.0.1")
        )
        if answer.status not in (200, 204):
            raise InvalidRequest(f"preparing the dev server failed: {path} answered {answer.status}: {answer.body!r}")


def print_dev_banner(config: ServerConfig, secrets: DevSecrets, ca_file: str = "") -> None:
    """The warning and the credentials, on standard output; ``ca_file`` is what a client must trust, if there is TLS."""
    trust = f"    $ export VAULT_CACERT='{ca_file}'\n" if ca_file else ""
    print(
        f"""WARNING! dev mode is enabled! In this mode, {product()} runs entirely in-memory
and starts unsealed with a single unseal key. The root token is not stored
in a file: export it, or log in with it.

You may need to set the following environment variables:

    $ export VAULT_ADDR='{config.api_addr}'
{trust}    $ export VAULT_TOKEN='{secrets.root_token}'

The unseal key and root token are displayed below in case you want to
seal/unseal the server or re-authenticate.

Unseal Key: {secrets.unseal_key}
Root Token: {secrets.root_token}

Development mode should NOT be used in production installations!
""",
        flush=True,
    )

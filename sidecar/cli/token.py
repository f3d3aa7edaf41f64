"""``outrider token``: create, look up, renew and revoke; and ``outrider unwrap``."""

from __future__ import annotations

from typing import Any

from sidecar.cli.command import EXIT_OK, Call, Command, doing
from sidecar.cli.flags import Flag, UsageError

# Flags that go into the request as they are, under another name.
_TEXTS = {
    "display-name": "display_name",
    "entity-alias": "entity_alias",
    "explicit-max-ttl": "explicit_max_ttl",
    "id": "id",
    "period": "period",
    "ttl": "ttl",
    "type": "type",
}


def create(call: Call) -> int:
    call.at_most(0)
    values = call.values
    request: dict[str, Any] = {name: values.text(flag) for flag, name in _TEXTS.items() if flag in values}
    policies = [part for text in values.texts("policy") for part in text.split(",") if part]
    if policies:
        request["policies"] = policies
    if values.texts("metadata"):
        request["meta"] = _metadata(values.texts("metadata"))
    if "use-limit" in values:
        request["num_uses"] = values.integer("use-limit", 0)
    request["renewable"] = values.text("renewable", "true") == "true"
    request["no_default_policy"] = values.flag("no-default-policy")
    role, orphan = values.text("role"), values.flag("orphan")
    if role and orphan:
        raise UsageError("-orphan has no meaning with -role: the role decides")
    path = f"auth/token/create/{role}" if role else "auth/token/create-orphan" if orphan else "auth/token/create"
    client = call.client()
    with doing("creating token"):
        return call.show_secret(client.post(path, request))


def _metadata(texts: list[str]) -> dict[str, str]:
    found = {}
    for number, text in enumerate(texts, start=1):
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UsageError(f"-metadata number {number} is not key=value")
        found[key] = value
    return found


def lookup(call: Call) -> int:
    token = _one_token(call)
    client = call.client()
    with doing("looking up token"):
        if call.values.flag("accessor"):
            return call.show_secret(client.post("auth/token/lookup-accessor", {"accessor": token}))
        if token:
            return call.show_secret(client.post("auth/token/lookup", {"token": token}))
        return call.show_secret(client.get("auth/token/lookup-self"))


def renew(call: Call) -> int:
    token = _one_token(call)
    request: dict[str, Any] = {"increment": call.values.text("increment", "0")}
    client = call.client()
    with doing("renewing token"):
        if call.values.flag("accessor"):
            return call.show_secret(client.post("auth/token/renew-accessor", {**request, "accessor": token}))
        if token:
            return call.show_secret(client.put("auth/token/renew", {**request, "token": token}))
        return call.show_secret(client.put("auth/token/renew-self", request))


def revoke(call: Call) -> int:
    call.at_most(1)
    token = call.arguments[0].strip() if call.arguments else ""
    own, by_accessor, mode = call.values.flag("self"), call.values.flag("accessor"), call.values.text("mode")
    if mode not in ("", "orphan"):
        raise UsageError("-mode can only be orphan")
    if own == bool(token):
        raise UsageError("give either a TOKEN or -self")
    if sum((own, by_accessor, bool(mode))) > 1:
        raise UsageError("-self, -accessor and -mode cannot be given together")
    client = call.client()
    with doing("revoking token"):
        if own:
            client.put("auth/token/revoke-self")
        elif by_accessor:
            client.post("auth/token/revoke-accessor", {"accessor": token})
        else:
            client.put("auth/token/revoke-orphan" if mode else "auth/token/revoke", {"token": token})
    call.say("Success! Revoked token (if it existed)")
    return EXIT_OK


def _one_token(call: Call) -> str:
    """The argument; empty for the user's own token. Raises UsageError where an accessor is missing."""
    call.at_most(1)
    token = call.arguments[0].strip() if call.arguments else ""
    if call.values.flag("accessor") and not token:
        raise UsageError("not enough arguments: ACCESSOR is missing")
    return token


def unwrap(call: Call) -> int:
    """A wrapping token is its own permission; a user who is logged in asks as that user."""
    call.at_most(1)
    token = call.arguments[0].strip() if call.arguments else ""
    own = call.token()
    if not token and not own:
        raise UsageError("not enough arguments: TOKEN is missing")
    client = call.client(token=own or token)
    with doing("unwrapping"):
        return call.show_secret(client.put("sys/wrapping/unwrap", {"token": token} if own and token else {}))


ACCESSOR_FLAG = Flag("accessor", "The argument is an accessor, not a token.", "bool")
CREATE = Command(
    "token create [flags]",
    "Make a token, as a child of the one in use unless -orphan or the role says otherwise.",
    create,
    (
        Flag("policy", "A policy of the token; repeatable. Those of the parent without it.", "texts"),
        Flag("ttl", "First life of the token."),
        Flag("explicit-max-ttl", "Hard limit of its life, whatever is renewed."),
        Flag("period", "Makes it periodic: each renewal sets its life back to this."),
        Flag("use-limit", "Number of requests it is good for; 0 for any.", "int", "0"),
        Flag("renewable", "Whether it can be renewed.", "bool", "true"),
        Flag("orphan", "Without parent: no other token's end takes it along.", "bool"),
        Flag("no-default-policy", "Without the default policy.", "bool"),
        Flag("display-name", "Name for logs."),
        Flag("metadata", "key=value for logs; repeatable.", "texts"),
        Flag("role", "Token role to make it with."),
        Flag("type", "service or batch.", default="service"),
        Flag("entity-alias", "Alias of the entity it belongs to, with -role."),
        Flag("id", "The token itself, instead of one the server makes up."),
    ),
    field=True,
)
LOOKUP = Command(
    "token lookup [flags] [TOKEN]", "Show a token; the one in use without TOKEN.", lookup, (ACCESSOR_FLAG,), field=True
)
RENEW = Command(
    "token renew [flags] [TOKEN]",
    "Let a token live longer; the one in use without TOKEN.",
    renew,
    (ACCESSOR_FLAG, Flag("increment", "How much longer; the server may give less.", aliases=("i",))),
    field=True,
)
REVOKE = Command(
    "token revoke [flags] [TOKEN]",
    "Revoke a token with its children.",
    revoke,
    (
        ACCESSOR_FLAG,
        Flag("self", "Revoke the token in use.", "bool"),
        Flag("mode", "orphan: leave the children alive, as orphans."),
    ),
    formats=False,
)
UNWRAP = Command("unwrap [flags] [TOKEN]", "Redeem a wrapping token. It works once.", unwrap, field=True)

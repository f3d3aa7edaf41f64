"""``outrider login``: check or get a token and keep it for the calls that follow."""

from __future__ import annotations

from typing import Any

from sidecar.cli import output, token_file
from sidecar.cli.command import EXIT_OK, Call, Command, Failed, doing
from sidecar.cli.flags import Flag, UsageError
from sidecar.cli.values import parse_data

KEPT = """Success! You are now authenticated. The token information displayed below
is already stored in the token helper. You do NOT need to run "outrider login"
again. Future requests will automatically use this token."""
NOT_KEPT = """Success! You are now authenticated. The token was not stored in token helper.
Set the VAULT_TOKEN environment variable or pass the token below with each
request to use it."""


def run(call: Call) -> int:
    methods = {"token": _with_token, "userpass": _with_userpass}
    method = call.values.text("method", "token")
    if method not in methods:
        raise UsageError(f"unknown auth method; there are {', '.join(methods)}")
    auth = methods[method](call)
    token = auth.get("client_token", "")
    if call.values.flag("token-only"):
        call.say(token)
        return EXIT_OK
    keep = not call.values.flag("no-store")
    if keep:
        try:
            token_file.write(call.environ, token)
        except OSError as error:
            raise Failed(f"Error storing token: {error.strerror}", 1) from error
    if call.values.flag("no-print"):
        return EXIT_OK
    if call.setting("TOKEN"):
        call.complain("WARNING! The VAULT_TOKEN environment variable is set! It wins over the stored token.\n")
    if call.values.text("field"):
        return call.show_field({"auth": auth}, call.values.text("field"))
    text = f"{KEPT if keep else NOT_KEPT}\n\n{output.pairs(output.auth_rows(auth))}"
    return call.show_value(output.envelope({"auth": auth}), text)


def _with_token(call: Call) -> dict[str, Any]:
    call.at_most(1)
    given = call.arguments[0] if call.arguments else "-"
    token = (call.hidden("Token (will be hidden): ") if given == "-" else given.removeprefix("token=")).strip()
    if not token:
        raise UsageError("the token is empty")
    client = call.client(token=token)
    with doing("authenticating"):
        data = (client.get("auth/token/lookup-self").body or {}).get("data") or {}
    return {
        "client_token": token,
        "accessor": data.get("accessor", ""),
        "lease_duration": data.get("ttl") or 0,
        "renewable": bool(data.get("renewable")),
        "token_policies": data.get("policies") or [],
        "policies": data.get("policies") or [],
        "identity_policies": data.get("identity_policies") or [],
        "metadata": data.get("meta"),
    }


def _with_userpass(call: Call) -> dict[str, Any]:
    data = parse_data(call.arguments, call.read_stdin)
    username = str(data.get("username", ""))
    if not username:
        raise UsageError("username=... is missing")
    password = str(data.get("password", "")) or call.hidden("Password (will be hidden): ")
    mount = call.values.text("path", "userpass").strip("/").removeprefix("auth/")
    client = call.client(token="")
    with doing("authenticating"):
        reply = client.put(f"auth/{mount}/login/{username}", {"password": password})
    call.warn_of(reply.body)
    auth = (reply.body or {}).get("auth")
    if not isinstance(auth, dict):
        raise Failed("Error authenticating: the answer holds no token", 2)
    return auth


LOGIN = Command(
    "login [flags] [TOKEN | username=NAME password=...]",
    "Log in and keep the token in ~/.vault-token. What is missing is asked for, hidden.",
    run,
    (
        Flag("method", "token or userpass.", default="token"),
        Flag("path", "Where the auth method is mounted.", default="the method's name"),
        Flag("no-store", "Do not keep the token.", "bool"),
        Flag("no-print", "Print nothing.", "bool"),
        Flag("token-only", "Print the token only and do not keep it.", "bool"),
    ),
    field=True,
)

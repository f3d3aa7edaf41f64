"""What a command is, and what it is given when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from sidecar.cli import output
from sidecar.cli.flags import Flag, UsageError, Values, describe

if TYPE_CHECKING:
    from sidecar.cli.client import Client, Reply

EXIT_OK, EXIT_LOCAL, EXIT_SERVER, EXIT_UNKNOWN = 0, 1, 2, 127
DEFAULT_ADDRESS = "https://127.0.0.1:8200"


class Failed(Exception):
    """A command cannot go on. The text is for the user and says what was being done; ``code`` is the exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class NotSent(Exception):
    """The request was asked for as text, which this is."""


def program() -> str:
    """The name this command line was called by, where it is one of its names."""
    name = os.path.basename(sys.argv[0])
    return name if name == "vault" else "outrider"


@contextmanager
def doing(what: str, code: int = EXIT_SERVER) -> Iterator[None]:
    """Name the action in the error of any call within: ``Error reading secret/a: ...``. As in Vault, a server that
    cannot be reached counts as one that said no."""
    from sidecar.cli.client import ApiError, LocalError

    try:
        yield
    except (ApiError, LocalError) as error:
        raise Failed(f"Error {what}: {error}", code) from error


HTTP_FLAGS = (
    Flag("address", "URL of the server, or unix:///path. VAULT_ADDR.", default=DEFAULT_ADDRESS),
    Flag("ca-cert", "PEM file with the CA that signed the server's certificate. VAULT_CACERT."),
    Flag("ca-path", "Directory of PEM files with such CAs. VAULT_CAPATH."),
    Flag("client-cert", "PEM file with a client certificate. VAULT_CLIENT_CERT."),
    Flag("client-key", "PEM file with its private key. VAULT_CLIENT_KEY."),
    Flag("tls-server-name", "Name expected in the server's certificate. VAULT_TLS_SERVER_NAME."),
    Flag("tls-skip-verify", "Do not verify the server's certificate. VAULT_SKIP_VERIFY.", "bool"),
    Flag("namespace", "Namespace of the request. VAULT_NAMESPACE.", aliases=("ns",)),
    Flag("wrap-ttl", "Wrap the answer in a single-use token with this TTL. VAULT_WRAP_TTL."),
    Flag("header", "name=value header to send too; may be repeated.", "texts"),
    Flag("output-curl-string", "Print the request as a call of curl, and send nothing.", "bool"),
    Flag("output-policy", "Print the policy that the request needs, and send nothing.", "bool"),
    Flag("non-interactive", "Accepted: without a terminal nothing is asked for.", "bool"),
    Flag("policy-override", "Accepted: there are no Sentinel policies.", "bool"),
)
FORMAT_FLAG = Flag("format", "table, json, yaml or raw. VAULT_FORMAT.", default="table")
FIELD_FLAG = Flag("field", "Print only this field, without a newline where the output is no terminal.")


class Command(NamedTuple):
    """``usage`` is what follows the program's name; ``details`` may run over lines. ``http`` commands take the flags of
    a client."""

    usage: str
    details: str
    run: Callable[[Call], int]
    flags: tuple[Flag, ...] = ()
    http: bool = True
    formats: bool = True
    field: bool = False

    def all_flags(self) -> tuple[Flag, ...]:
        shown = (FORMAT_FLAG,) if self.formats else ()
        return (*(HTTP_FLAGS if self.http else ()), *shown, *((FIELD_FLAG,) if self.field else ()), *self.flags)

    def help(self) -> str:
        """The whole help text."""
        sections = [f"Usage: outrider {self.usage}\n\n  {self.details}\n"]
        shown = (*((FORMAT_FLAG,) if self.formats else ()), *((FIELD_FLAG,) if self.field else ()))
        if self.http:
            sections.append(describe("HTTP Options", HTTP_FLAGS))
        if shown:
            sections.append(describe("Output Options", shown))
        if self.flags:
            sections.append(describe("Command Options", self.flags))
        return "\n".join(sections).rstrip() + "\n"


class Call:
    """One run of a command: its flags and arguments, the environment, and the ways to print."""

    def __init__(self, values: Values, arguments: list[str], *, formats: bool = True) -> None:
        self.values = values
        self.arguments = arguments
        self.environ: Mapping[str, str] = os.environ
        self.format = self._format() if formats else "table"

    def setting(self, name: str, default: str = "") -> str:
        """An environment variable: OUTRIDER_<name>, else VAULT_<name>."""
        return self.environ.get(f"OUTRIDER_{name}") or self.environ.get(f"VAULT_{name}") or default

    def option(self, flag: str, name: str, default: str = "") -> str:
        """A flag, else the environment, else the default."""
        return self.values.text(flag) or self.setting(name, default)

    def token(self) -> str:
        """The client token: environment, else what ``login`` stored."""
        from sidecar.cli import token_file

        return self.setting("TOKEN") or token_file.read(self.environ)

    def client(self, *, token: str | None = None, wrap_ttl: str = "") -> Client:
        """A client as flags and environment describe it; ``token`` None takes the user's, "" sends none."""
        from sidecar.cli.client import Client, ClientOptions, LocalError

        skip_verify = self.values.text("tls-skip-verify") or self.setting("SKIP_VERIFY")
        options = ClientOptions(
            address=self.option("address", "ADDR", DEFAULT_ADDRESS),
            token=self.token() if token is None else token,
            namespace=self.option("namespace", "NAMESPACE"),
            ca_file=self.option("ca-cert", "CACERT"),
            ca_path=self.option("ca-path", "CAPATH"),
            client_cert=self.option("client-cert", "CLIENT_CERT"),
            client_key=self.option("client-key", "CLIENT_KEY"),
            tls_server_name=self.option("tls-server-name", "TLS_SERVER_NAME"),
            tls_skip_verify=skip_verify.lower() in ("1", "t", "true"),
            timeout_s=self._number("CLIENT_TIMEOUT", 60.0),
            retries_max=int(self._number("MAX_RETRIES", 2)),
            wrap_ttl=self.option("wrap-ttl", "WRAP_TTL", wrap_ttl),
            headers=self._headers(),
            as_curl=self.values.flag("output-curl-string"),
            as_policy=self.values.flag("output-policy"),
        )
        try:
            return Client(options)
        except LocalError as error:
            raise UsageError(str(error)) from error

    def _headers(self) -> dict[str, str]:
        found = {}
        for text in self.values.texts("header"):
            name, equals, value = text.partition("=")
            if not equals or not name.strip():
                raise UsageError("-header must be name=value")
            if name.strip().lower().startswith("x-vault-"):
                raise UsageError("-header sets no header that begins with X-Vault-")
            found[name.strip()] = value.strip()
        return found

    def path(self, number: int = 0, what: str = "PATH") -> str:
        """An argument that is a path, without slashes around it."""
        path = self.argument(number, what).strip("/")
        if not path:
            raise UsageError(f"{what} is empty")
        return path

    def argument(self, number: int, what: str) -> str:
        if number >= len(self.arguments):
            raise UsageError(f"not enough arguments: {what} is missing")
        return self.arguments[number]

    def at_most(self, count: int) -> None:
        """Refuse surplus arguments."""
        if len(self.arguments) > count:
            raise UsageError(f"too many arguments (expected {count}, got {len(self.arguments)})")

    def say(self, text: str) -> None:
        print(text)

    def complain(self, text: str) -> None:
        print(text, file=sys.stderr)

    def warn_of(self, body: Mapping[str, Any] | None) -> None:
        """Show an answer's warnings where they do not disturb its data."""
        warnings = (body or {}).get("warnings") or []
        if warnings and self.format in ("table", "pretty"):
            listed = "\n".join(f"  * {text}" for text in warnings)
            self.complain(f"WARNING! The following warnings were returned from the server:\n\n{listed}\n")

    def show_value(self, value: Any, as_table: str) -> int:
        """Print a JSON value in the chosen format; ``as_table`` is how the table looks."""
        self.say(as_table if self.format == "table" else output.encode(value, self.format))
        return EXIT_OK

    def show_field(self, body: Mapping[str, Any], name: str) -> int:
        """Print one field of an answer."""
        try:
            value = output.field_of(body, name)
        except KeyError:
            self.complain(f'Field "{name}" not present in secret')
            return EXIT_LOCAL
        text = output.raw_field(value, self.format)
        sys.stdout.write(text + ("\n" if sys.stdout.isatty() or self.format in ("json", "yaml") else ""))
        return EXIT_OK

    def show_secret(self, reply: Reply) -> int:
        """Print an answer that holds data, as ``-field`` and ``-format`` say."""
        body = output.as_secret(reply.body or {})
        self.warn_of(body)
        if self.format == "raw":
            sys.stdout.write(reply.text)
            return EXIT_OK
        if self.values.text("field"):
            return self.show_field(body, self.values.text("field"))
        if self.format != "table":
            return self.show_value(output.envelope(body), "")
        rows = output.secret_rows(body)
        if rows:
            self.say(output.pairs(rows))
        return EXIT_OK

    def read_stdin(self) -> str:
        return sys.stdin.read()

    def hidden(self, prompt: str) -> str:
        """A secret typed without echo, or the next line of standard input where that is no terminal."""
        if not sys.stdin.isatty():
            return sys.stdin.readline().rstrip("\r\n")
        from getpass import getpass

        return getpass(prompt)

    def _format(self) -> str:
        form = (self.values.text("format") or self.setting("FORMAT", "table")).lower()
        if form not in output.FORMATS:
            raise UsageError(f"invalid format; there are {', '.join(output.FORMATS)}")
        return "table" if form == "pretty" else form

    def _number(self, name: str, default: float) -> float:
        text = self.setting(name).strip()
        if not text:
            return default
        if text.isascii() and text.isdigit():
            return float(text)
        from sidecar.config.reader import parse_duration_s  # rarely needed, and slow to load

        try:
            return parse_duration_s(text)
        except ValueError as error:
            raise UsageError(f"environment {name} must be a number") from error

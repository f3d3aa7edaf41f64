"""``outrider audit``: enable, disable and list audit devices."""

from __future__ import annotations

from typing import Any

from sidecar.cli import output
from sidecar.cli.command import EXIT_OK, EXIT_SERVER, Call, Command, Failed, doing
from sidecar.cli.flags import Flag
from sidecar.cli.values import parse_data

_NONE = "No audit devices are enabled."


def enable(call: Call) -> int:
    kind = call.path(0, "TYPE")
    options = {name: str(value) for name, value in parse_data(call.arguments[1:], call.read_stdin).items()}
    mount = call.values.text("path", kind).strip("/")
    request: dict[str, Any] = {
        "type": kind,
        "description": call.values.text("description"),
        "local": call.values.flag("local"),
        "options": options,
    }
    client = call.client()
    with doing("enabling audit device"):
        client.put(f"sys/audit/{mount}", request)
    call.say(f"Success! Enabled the {kind} audit device at: {mount}/")
    return EXIT_OK


def disable(call: Call) -> int:
    call.at_most(1)
    mount = call.path(0, "PATH")
    client = call.client()
    with doing("disabling audit device"):
        client.delete(f"sys/audit/{mount}")
    call.say(f"Success! Disabled audit device (if it was enabled) at: {mount}/")
    return EXIT_OK


def list_devices(call: Call) -> int:
    call.at_most(0)
    client = call.client()
    with doing("listing audits"):
        body = client.get("sys/audit").body or {}
    devices = {path: device for path, device in sorted((body.get("data") or {}).items()) if isinstance(device, dict)}
    if not devices and call.format == "table":
        raise Failed(_NONE, EXIT_SERVER)
    if not call.values.flag("detailed"):
        rows = [(path, device.get("type", ""), device.get("description", "")) for path, device in devices.items()]
        return call.show_value(devices, output.table(("Path", "Type", "Description"), rows))
    detailed = [
        (
            path,
            device.get("type", ""),
            device.get("description", ""),
            "local" if device.get("local") else "replicated",
            " ".join(f"{name}={value}" for name, value in sorted((device.get("options") or {}).items())),
        )
        for path, device in devices.items()
    ]
    header = ("Path", "Type", "Description", "Replication", "Options")
    return call.show_value(devices, output.table(header, detailed))


ENABLE = Command(
    "audit enable [flags] TYPE [KEY=VALUE...]",
    "Turn an audit device on; the pairs are its options, as file_path=/var/log/outrider/audit.log.",
    enable,
    (
        Flag("path", "Name of the device.", default="the type's name"),
        Flag("description", "A line for people."),
        Flag("local", "Do not replicate it to performance secondaries.", "bool"),
    ),
    formats=False,
)
DISABLE = Command("audit disable [flags] PATH", "Turn an audit device off.", disable, formats=False)
LIST = Command(
    "audit list [flags]", "List the audit devices.", list_devices, (Flag("detailed", "Show options, too.", "bool"),)
)

"""Every command by name. Only the module of the command that runs is imported."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sidecar.cli.command import Command

GROUPS = {
    "audit": "Turn audit devices on and off",
    "auth": "Turn auth methods on and off",
    "kv": "Work with the versioned and unversioned key-value engine",
    "lease": "Look up, renew and revoke leases of secrets",
    "operator": "Initialise, unseal, seal, change keys and hand over",
    "plugin": "List what can be mounted",
    "policy": "Work with policies",
    "print": "Print what this command line works with",
    "replication": "Enable, watch, move and end replication, performance and DR",
    "secrets": "Turn secrets engines on and off",
    "token": "Create, look up, renew and revoke tokens",
    "transit": "Bring keys into the transit engine",
}


class Entry(NamedTuple):
    """``attribute`` of ``sidecar.cli.<module>`` is the Command."""

    summary: str
    module: str
    attribute: str


COMMANDS: dict[tuple[str, ...], Entry] = {
    ("read",): Entry("Read data", "data", "READ"),
    ("write",): Entry("Write data, or call an endpoint", "data", "WRITE"),
    ("list",): Entry("List names", "data", "LIST"),
    ("delete",): Entry("Delete data", "data", "DELETE"),
    ("patch",): Entry("Change some fields of data", "data", "PATCH"),
    ("debug",): Entry("Capture what a node says of itself", "debug", "DEBUG"),
    ("login",): Entry("Get a token and keep it", "login", "LOGIN"),
    ("monitor",): Entry("Follow the server's log", "looking", "MONITOR"),
    ("path-help",): Entry("Show the help text of an endpoint", "looking", "PATH_HELP"),
    ("server",): Entry("Run a node", "server", "SERVER"),
    ("status",): Entry("Seal and leader status of a node", "status", "STATUS"),
    ("unwrap",): Entry("Redeem a wrapping token", "token", "UNWRAP"),
    ("version",): Entry("Print the version", "version", "VERSION"),
    ("version-history",): Entry("Versions that have led the cluster", "looking", "VERSION_HISTORY"),
    ("audit", "enable"): Entry("Turn an audit device on", "audit", "ENABLE"),
    ("audit", "disable"): Entry("Turn an audit device off", "audit", "DISABLE"),
    ("audit", "list"): Entry("List audit devices", "audit", "LIST"),
    ("auth", "enable"): Entry("Turn an auth method on", "mounts", "AUTH_ENABLE"),
    ("auth", "disable"): Entry("Turn an auth method off", "mounts", "AUTH_DISABLE"),
    ("auth", "list"): Entry("List auth methods", "mounts", "AUTH_LIST"),
    ("auth", "tune"): Entry("Change settings of an auth method", "tuning", "AUTH_TUNE"),
    ("auth", "help"): Entry("Show the help text of an auth method", "looking", "AUTH_HELP"),
    ("auth", "move"): Entry("Give an auth method another path", "tuning", "AUTH_MOVE"),
    ("kv", "get"): Entry("Read a secret", "kv", "GET"),
    ("kv", "put"): Entry("Write a secret, or its next version", "kv", "PUT"),
    ("kv", "list"): Entry("List secrets", "kv", "LIST"),
    ("kv", "patch"): Entry("Change fields of a secret", "kv_changes", "PATCH"),
    ("kv", "rollback"): Entry("Make an old version the newest", "kv_changes", "ROLLBACK"),
    ("kv", "enable-versioning"): Entry("Upgrade a mount to version 2", "kv_changes", "ENABLE_VERSIONING"),
    ("kv", "delete"): Entry("Delete a secret, or versions of it", "kv", "DELETE"),
    ("kv", "undelete"): Entry("Bring deleted versions back", "kv", "UNDELETE"),
    ("kv", "destroy"): Entry("Remove versions for good", "kv", "DESTROY"),
    ("kv", "metadata", "get"): Entry("Show a secret's versions and settings", "kv", "METADATA_GET"),
    ("kv", "metadata", "put"): Entry("Change a secret's settings", "kv_changes", "METADATA_PUT"),
    ("kv", "metadata", "patch"): Entry("Change some of a secret's settings", "kv_changes", "METADATA_PATCH"),
    ("kv", "metadata", "delete"): Entry("Remove a secret with all its versions", "kv", "METADATA_DELETE"),
    ("lease", "lookup"): Entry("Show a lease", "lease", "LOOKUP"),
    ("lease", "renew"): Entry("Let a secret live longer", "lease", "RENEW"),
    ("lease", "revoke"): Entry("Have secrets taken back", "lease", "REVOKE"),
    ("operator", "init"): Entry("Initialise a cluster", "operator", "INIT"),
    ("operator", "unseal"): Entry("Give a node a share of its unseal key", "operator", "UNSEAL"),
    ("operator", "seal"): Entry("Seal a node", "operator", "SEAL"),
    ("operator", "step-down"): Entry("Let another node lead", "operator", "STEP_DOWN"),
    ("operator", "rekey"): Entry("Replace the key shares", "operator_keys", "REKEY"),
    ("operator", "generate-root"): Entry("Make a root token from key shares", "operator_keys", "GENERATE_ROOT"),
    ("operator", "key-status"): Entry("Show the data key", "operator_keys", "KEY_STATUS"),
    ("operator", "rotate"): Entry("Use a fresh data key", "operator_keys", "ROTATE"),
    ("operator", "members"): Entry("List the nodes of the cluster", "operator_keys", "MEMBERS"),
    ("operator", "diagnose"): Entry("Check a configuration on this machine", "diagnose", "DIAGNOSE"),
    ("operator", "usage"): Entry("Show what is recorded of clients", "looking", "USAGE"),
    ("policy", "write"): Entry("Write a policy from a file", "policy", "WRITE"),
    ("policy", "read"): Entry("Print a policy", "policy", "READ"),
    ("policy", "list"): Entry("List policies", "policy", "LIST"),
    ("policy", "delete"): Entry("Delete a policy", "policy", "DELETE"),
    ("policy", "fmt"): Entry("Lay a policy file out as is usual", "policy", "FMT"),
    ("plugin", "info"): Entry("Show what can be mounted", "looking", "PLUGIN_INFO"),
    ("plugin", "list"): Entry("List what can be mounted", "looking", "PLUGIN_LIST"),
    ("plugin", "reload"): Entry("Load engines of mounts anew", "looking", "PLUGIN_RELOAD"),
    ("print", "token"): Entry("Print the token in use", "looking", "PRINT_TOKEN"),
    ("replication", "status"): Entry("Roles, positions and connections", "replication", "STATUS"),
    ("replication", "enable-primary"): Entry("Make this cluster a primary", "replication", "ENABLE_PRIMARY"),
    ("replication", "secondary-token"): Entry("Issue a secondary's token", "replication", "SECONDARY_TOKEN"),
    ("replication", "enable-secondary"): Entry("Make this cluster a secondary", "replication", "ENABLE_SECONDARY"),
    ("replication", "generate-public-key"): Entry("Make a key for a token", "replication", "GENERATE_PUBLIC_KEY"),
    ("replication", "rotate-ca"): Entry("Replace the certificate authority", "replication", "ROTATE_CA"),
    ("replication", "demote"): Entry("Make a primary a secondary", "replication", "DEMOTE"),
    ("replication", "promote"): Entry("Make a secondary the primary", "replication", "PROMOTE"),
    ("replication", "update-primary"): Entry("Follow another primary", "replication", "UPDATE_PRIMARY"),
    ("replication", "disable"): Entry("Give up a replication role", "replication", "DISABLE"),
    ("replication", "accept-deletions"): Entry("Let a braked secondary go on", "replication", "ACCEPT_DELETIONS"),
    ("replication", "lost-writes"): Entry("Show what was lost at a failover", "replication", "LOST_WRITES"),
    ("replication", "revoke"): Entry("Cut a secondary off for good", "replication", "REVOKE"),
    ("secrets", "enable"): Entry("Turn a secrets engine on", "mounts", "SECRETS_ENABLE"),
    ("secrets", "disable"): Entry("Turn a secrets engine off", "mounts", "SECRETS_DISABLE"),
    ("secrets", "list"): Entry("List secrets engines", "mounts", "SECRETS_LIST"),
    ("secrets", "tune"): Entry("Change settings of a secrets engine", "tuning", "SECRETS_TUNE"),
    ("secrets", "move"): Entry("Give a secrets engine another path", "tuning", "SECRETS_MOVE"),
    ("token", "create"): Entry("Make a token", "token", "CREATE"),
    ("token", "lookup"): Entry("Show a token", "token", "LOOKUP"),
    ("token", "renew"): Entry("Let a token live longer", "token", "RENEW"),
    ("token", "revoke"): Entry("Revoke a token", "token", "REVOKE"),
    ("token", "capabilities"): Entry("Show what a token may do at a path", "looking", "CAPABILITIES"),
    ("transit", "import"): Entry("Bring a key of one's own", "transit", "IMPORT"),
    ("transit", "import-version"): Entry("Bring another version of it", "transit", "IMPORT_VERSION"),
}


def find(tokens: Sequence[str]) -> tuple[str, ...] | None:
    """The command that the first tokens name."""
    for length in (3, 2, 1):
        if tuple(tokens[:length]) in COMMANDS:
            return tuple(tokens[:length])
    return None


def load(name: tuple[str, ...]) -> Command:
    """Import a command."""
    entry = COMMANDS[name]
    command: Command = getattr(import_module(f"sidecar.cli.{entry.module}"), entry.attribute)
    return command


def overview() -> str:
    """The help text of the program."""
    single = {name[0]: entry.summary for name, entry in COMMANDS.items() if len(name) == 1}
    lines = ["Usage: outrider <command> [flags] [arguments]", "", "Commands:"]
    lines += [f"    {name:<14}{summary}" for name, summary in single.items()]
    lines += ["", "Groups of commands:"]
    lines += [f"    {name:<14}{summary}" for name, summary in GROUPS.items()]
    lines += ["", "Every command has -h. Environment: VAULT_* or OUTRIDER_*, as VAULT_ADDR and VAULT_TOKEN."]
    return "\n".join(lines)


def group_help(group: str) -> str:
    """The help text of a group."""
    lines = [f"Usage: outrider {group} <subcommand> [flags] [arguments]", "", f"  {GROUPS[group]}.", "", "Subcommands:"]
    lines += [f"    {' '.join(name[1:]):<18}{entry.summary}" for name, entry in COMMANDS.items() if name[0] == group]
    return "\n".join(lines)

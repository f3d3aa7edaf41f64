"""The logical keys the core writes, in one place: who looks for an entry finds its name here.

``r`` is replicated, ``l`` reaches DR secondaries only, ``c`` never leaves the cluster (architecture, section 1).
"""

from __future__ import annotations

SEAL = "c/core/seal"
# What the newest rekey made of the seal record, for the secondaries: their key shares are the primary's.
SEAL_SHARES = "r/core/seal"
REPLICATED_KEYRING = "r/core/keyring"
LOCAL_KEYRING = "l/core/keyring"
PRIVATE_KEYRING = "c/core/keyring"
CLUSTER = "l/core/cluster"
PRIVATE_CLUSTER = "c/core/cluster"
JWT_KEY = "r/core/jwtkey"
QUOTAS = "r/quota/rate-limit/"
QUOTA_CONFIG = "r/quota/config"
VERSIONS = "l/core/versions/"
CORS = "r/core/config/cors"
AUDITED_HEADERS = "r/core/config/audited-headers"
UI_HEADERS = "r/core/config/ui-headers"
ROTATION = "r/core/rotation"
# PGP messages of a rekey with a backup: they belong to the seal record, and go where it goes.
UNSEAL_KEYS_BACKUP = "c/core/unseal-keys-backup"
RECOVERY_KEYS_BACKUP = "c/core/recovery-keys-backup"

# These entries protect themselves with the root key or the unseal key: the barrier cannot open what it is made from.
RAW_KEYS = frozenset({SEAL, REPLICATED_KEYRING, LOCAL_KEYRING, PRIVATE_KEYRING})

POLICIES = "r/policy/acl/"
PASSWORD_POLICIES = "r/policy/password/"  # noqa: S105 - a name, not a secret

TOKEN_ROLES = "r/token/role/"  # noqa: S105 - a name, not a secret
TOKEN_SALT = "l/token/salt"  # noqa: S105 - a name, not a secret
TOKEN_IDS = "l/token/id/"  # noqa: S105 - a path, no secret
TOKEN_ACCESSORS = "l/token/accessor/"  # noqa: S105 - a path, no secret
TOKEN_PARENTS = "l/token/parent/"  # noqa: S105 - a path, no secret
TOKEN_REVOKING = "l/token/revoking/"  # noqa: S105 - a path, no secret
# One entry a lease, of tokens too, and nothing else: their number is the number of leases.
LEASES = "l/expire/"
LEASES_DUE = "l/lease/due/"
LEASES_BY_TOKEN = "l/lease/token/"  # noqa: S105 - a path, no secret
LEASES_IRREVOCABLE = "l/lease/irrevocable/"
LOCKED_USERS = "l/lockout/"

CUBBYHOLES = "l/cubbyhole/"

MAIN_FOLDER, LOCAL_FOLDER = "main/", "local/"
"""Of a local mount."""

AUDIT_TABLES = ("r/core/audit/", "l/core/audit/")


def keyring(storage_class: str) -> str:
    """Where the ring of ``storage_class`` is kept; that of ``c`` need not exist."""
    return {"r": REPLICATED_KEYRING, "c": PRIVATE_KEYRING}.get(storage_class, LOCAL_KEYRING)


def local_key(mount_uuid: str, path: str, *, local_mount: bool) -> str:
    """The entry at ``path`` of a mount's local storage. Both storages of a local mount are of one class: folders keep
    them apart."""
    return f"l/{mount_uuid}/{LOCAL_FOLDER if local_mount else ''}{path}"


def partition_of(key: str) -> str:
    """``class/partition``: as much of a key as an error text may name."""
    return "/".join(key.split("/", 2)[:2])

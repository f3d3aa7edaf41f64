"""What the replication endpoints say to people. The first sentences are the contract's, which clients match on."""

ENABLING_PRIMARY = (
    "This cluster is being enabled as a primary for replication. Vault will be unavailable for a brief period and will "
    "resume service shortly."
)
DEMOTING = (
    "This cluster is being demoted to a replication secondary. Vault will be unavailable for a brief period and will "
    "resume service shortly."
)
PROMOTING = (
    "This cluster is being promoted to a replication primary. Vault will be unavailable for a brief period and will "
    "resume service shortly."
)
DISABLING = (
    "This cluster is having replication disabled. Vault will be unavailable for a brief period and will resume service "
    "shortly."
)
ENABLING_SECONDARY = (
    "Vault has successfully found secondary information; it may take a while to perform setup tasks. Vault will be "
    "unavailable until these tasks and initial sync complete."
)
DR_PATH_DISABLED = "path disabled in replication DR secondary mode"

UPDATING_PRIMARY = (
    "This secondary follows the given primary from now on; see sys/replication/status. Nothing was wiped."
)
FORGETTING = "This secondary follows nobody from now on, and keeps the data it has."
FORCED = "Promoted by force, although: {objection}"
PLAIN_HTTP = (
    "The primary's API address is not https: the activation token was sent to it unprotected, and anybody on the way "
    "could have used it."
)
REINDEXING = "The reindex runs in the background; see sys/replication/status for its progress."
REINDEX_CANCELLED = "The running reindex was cancelled. What it repaired stays repaired; start it again for the rest."
RECOVERING = "This cluster is trying to leave an adverse state; see sys/replication/status."
DELETIONS_ACCEPTED = (
    "The comparison with the primary begins anew and may delete so many entries; see sys/replication/status."
)
GOING_ON = (
    "This cluster goes on with the store as it is, in a new replication epoch. Its secondaries follow by a merkle "
    "sync; what only they have becomes lost-writes there."
)
OTHER_ROOT_KEY = (
    "that primary uses another root key than this cluster: disable replication here and enable this cluster as its "
    "secondary, which replaces everything it holds; the token is used up"
)
ROTATING_AUTHORITY = (
    "Both certificate authorities count until every secondary has renewed its certificate, or until the deadline; see "
    "certificate_authority in the status. A secondary that misses it needs a new token."
)
AUTHORITY_ENDED = (
    "The old certificate authority ended. Secondaries that had not renewed their certificate need a new token."
)

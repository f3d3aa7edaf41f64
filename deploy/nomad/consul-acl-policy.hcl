# What one Outrider node's Consul token must be allowed, and nothing more (Consul 1.4 or newer, ACL default deny).
#
#   consul acl policy create -name outrider -rules @consul-acl-policy.hcl
#   consul acl token create -description outrider -policy-name outrider
#
# Change "outrider/" and "outrider" together with `path` in the storage stanza and `service` in service_registration.
# The token must outlive the node: Consul removes a dead node's leftovers with the token that registered them.

# The cluster's whole state: data, log, index, lock. "write" includes reading and listing.
key_prefix "outrider/" {
  policy = "write"
}

# Leadership is a session on the local agent's node. Name the nodes with `session "<node>"` to narrow this.
session_prefix "" {
  policy = "write"
}

# The service "outrider" that clients look up, and "outrider-beat", one per process, whose check keeps the session.
# A service check needs no right on the node; a node check would.
service_prefix "outrider" {
  policy = "write"
}

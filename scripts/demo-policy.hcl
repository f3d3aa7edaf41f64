# What the demo's user may do: read and write the shop's secrets.
path "secret/data/shop/*" {
  capabilities = ["create", "read", "update"]
}

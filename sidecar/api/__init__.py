"""The Vault-compatible HTTP API: server, envelopes, ``sys/`` endpoints. Only the wiring imports it."""

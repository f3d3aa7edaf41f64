"""The Vault-compatible HTTP API: server, envelopes, ``sys/`` endpoints. Imports request and core; only the wiring imports it."""

"""Replication sets in the simulator: several clusters, each on a Consul of its own, and a network in between."""

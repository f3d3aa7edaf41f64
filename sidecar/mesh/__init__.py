"""How the outside finds a node: its entry in Consul's catalog."""

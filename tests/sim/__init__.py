"""Whole-protocol simulation: the real election and replicated store on a simulated Consul, in virtual time."""

"""Cryptography as a service: named keys that never leave, and what can be done with them."""

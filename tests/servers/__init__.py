"""Servers the tests run against: a real Azurite, and a proxy that injects storage faults in front of it."""

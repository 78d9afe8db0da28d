"""Fixtures for every test."""

pytest_plugins = ["tests.servers.fixtures", "tests.mounting"]

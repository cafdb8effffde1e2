"""Checks whether a run is healthy: pure functions from numbers to findings, and code that gathers the numbers."""

"""Cached tokens where they lie: extents and blocks on the host, the tail, positions."""

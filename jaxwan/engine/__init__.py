"""Requests that arrive at any time, on one mesh: `Engine` (docs/engine.md)."""

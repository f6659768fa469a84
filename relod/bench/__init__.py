"""Measuring this machine: `relod bench`. Imported by nothing but the commands."""

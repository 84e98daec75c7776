"""Test harness: brokers, processes, chaos runs."""

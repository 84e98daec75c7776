"""Model inference in worker processes."""

"""Commands of ``kronos-stream``, one module each, imported when they run."""

"""State file: an SQLite database with one owner."""

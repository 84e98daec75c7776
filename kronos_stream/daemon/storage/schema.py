"""Schema of the state file and its upgrades."""

from __future__ import annotations

SCHEMA = (
    """
CREATE TABLE series (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
                     origin INTEGER, revision INTEGER NOT NULL DEFAULT 0);
CREATE TABLE bars (series INTEGER NOT NULL, time INTEGER NOT NULL,
                   open REAL NOT NULL, high REAL NOT NULL, low REAL NOT NULL, close REAL NOT NULL,
                   volume REAL NOT NULL, amount REAL, revision INTEGER NOT NULL,
                   synthetic INTEGER NOT NULL, received INTEGER NOT NULL,
                   PRIMARY KEY (series, time)) WITHOUT ROWID;
CREATE TABLE outcomes (series INTEGER NOT NULL, origin INTEGER NOT NULL, revision INTEGER NOT NULL,
                       result TEXT NOT NULL, reason TEXT NOT NULL,
                       PRIMARY KEY (series, origin, revision)) WITHOUT ROWID;
CREATE TABLE outbox (sequence INTEGER PRIMARY KEY AUTOINCREMENT, sink TEXT NOT NULL,
                     created INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL,
                     headers BLOB NOT NULL, value BLOB NOT NULL);
CREATE INDEX outbox_by_sink ON outbox (sink, sequence, created);
""",
    """
ALTER TABLE series ADD COLUMN followed INTEGER NOT NULL DEFAULT 0;
""",
    """
ALTER TABLE series ADD COLUMN relayed INTEGER NOT NULL DEFAULT -1;
""",
)
"""One script per version, each upgrading from the version before; never changed afterwards."""

SCHEMA_VERSION = len(SCHEMA)

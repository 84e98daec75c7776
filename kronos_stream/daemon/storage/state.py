"""The daemon's memory: closed bars, outcomes and undelivered records in one SQLite file.

Each call is one transaction. An outcome, the mark it moves and its records are in the same one:
where a power cut takes the last of them, the bars are due again, and the venues' histories bring
the bars back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, Self

import orjson
import structlog

from kronos_stream.daemon.requests import Outcome
from kronos_stream.daemon.storage.database import Database, StateError
from kronos_stream.interfaces.sink import Envelope, Record
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series

__all__ = ["Backlog", "PublishedBar", "State", "StateError"]

_log = structlog.get_logger()

_SCHEMA = (
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
"""One script per version; a file is brought up to date by those it lacks."""
SCHEMA_VERSION = len(_SCHEMA)

_BAR_COLUMNS = "time, open, high, low, close, volume, amount, revision, synthetic, received"
_PRUNE_BATCH = 2_000
"""What is pruned at once: nobody waits longer for the file than that takes."""
_VACUUM_PAGES, _MAX_FREE_PAGES = 1_000, 4_000


class PublishedBar(NamedTuple):
    """A closed bar that is passed on to others, who forecast."""

    series: Series
    bar: Bar
    triggers_forecast: bool
    """Whether they are to forecast from it."""


class Backlog(NamedTuple):
    """What waits for a sink."""

    records: int
    oldest: int | None
    """When the first of them was put into the outbox, UTC ms."""


class State:
    """An open state file. Every call returns when its transaction is committed.

    Every call may raise StateError: then the daemon cannot go on, and nothing is half done.
    """

    def __init__(self, database: Database) -> None:
        """:meth:`open` makes one."""
        self._db = database
        self._ids: dict[str, int] = {}
        database.on_rollback = self._ids.clear

    @property
    def path(self) -> Path:
        return self._db.path

    @classmethod
    async def open(cls, path: Path | None) -> Self:
        """Open or make the file and lock it. Raises StateError.

        path: None for a state in memory, gone at the end.
        """
        return cls(await Database.open(path, _SCHEMA))

    async def close(self) -> None:
        """Write everything into the one file and let it go."""
        await self._db.close()

    async def load(self, series: Series, bars: int, until: int | None = None) -> list[Bar]:
        """The newest ``bars`` closed bars that open at ``until`` or before, oldest first."""
        query = (
            f"SELECT {_BAR_COLUMNS} FROM bars "  # noqa: S608
            "WHERE series = (SELECT id FROM series WHERE name = ?) AND time <= ? "
            "ORDER BY time DESC LIMIT ?"
        )
        rows = await self._select(query, series.name, 2**62 if until is None else until, bars)
        return [_bar(row) for row in reversed(rows)]

    async def save_bars(self, rows: Sequence[tuple[Series, Bar]]) -> None:
        """Insert or replace."""
        await self._db.write(lambda: self._upsert_bars(rows))

    async def init_watermark(self, series: Series, origin: int) -> None:
        """Bars up to ``origin`` need no outcome; without effect if the series has a mark."""

        def begin() -> None:
            self._db.connection.execute(
                "UPDATE series SET origin = ? WHERE id = ? AND origin IS NULL",
                (origin, self._series_id(series.name)),
            )

        await self._db.write(begin)

    async def watermark(self, series: Series) -> tuple[int, int] | None:
        """Origin and revision of the newest bar with an outcome, or where the series began."""
        query = "SELECT origin, revision FROM series WHERE name = ? AND origin IS NOT NULL"
        rows = await self._select(query, series.name)
        return (rows[0][0], rows[0][1]) if rows else None

    async def last_relayed(self, series: Series) -> int:
        """Open of the newest bar of ``series`` that was passed on, UTC ms; -1 if none was."""
        rows = await self._select("SELECT relayed FROM series WHERE name = ?", series.name)
        return int(rows[0][0]) if rows else -1

    async def reset_relayed(self, names: Collection[str]) -> None:
        """Forget that bars of these series were passed on."""

        def forget() -> None:
            self._db.connection.executemany(
                "UPDATE series SET relayed = -1 WHERE name = ?", [(name,) for name in names]
            )

        await self._db.write(forget)

    async def followed_series(self) -> set[str]:
        """Names of the series that readers were not told to be gone."""
        return {name for (name,) in await self._select("SELECT name FROM series WHERE followed")}

    async def set_followed(self, names: Collection[str]) -> None:
        """Keep that exactly these are followed."""

        def follow() -> None:
            self._db.connection.execute("UPDATE series SET followed = 0")
            self._db.connection.executemany(
                "UPDATE series SET followed = 1 WHERE id = ?",
                [(self._series_id(name),) for name in names],
            )

        await self._db.write(follow)

    async def record(
        self,
        outcomes: Sequence[Outcome],
        envelopes: Sequence[Envelope],
        bars: Sequence[PublishedBar] = (),
        *,
        sinks: Collection[str] = (),
        created: int = 0,
    ) -> list[tuple[str, Record]]:
        """Save outcomes and put envelopes into the outbox of each sink, all or none.

        Returns (sink, record) pairs. created: UTC ms. bars: bars that these envelopes publish;
        they are saved too, and need no outcome.

        Only the first outcome of a bar is kept; a second one is logged as an error. The records
        are kept even then: a duplicate does less harm than a missing record.
        """

        def record() -> list[tuple[str, Record]]:
            for outcome in outcomes:
                self._insert_outcome(outcome)
            self._upsert_bars([one[:2] for one in bars])
            for series, bar, triggers_forecast in bars:
                self._mark_relayed(series, bar, triggers_forecast=triggers_forecast)
            return [
                (sink, self._insert_record(sink, envelope, created))
                for envelope in envelopes
                for sink in sinks
            ]

        return await self._db.write(record)

    async def outcomes(self, series: Series, since: int) -> list[Outcome]:
        """What became of the bars from ``since`` on, UTC ms of their opens."""
        query = (
            "SELECT name, outcomes.origin, outcomes.revision, result, reason FROM outcomes "
            "JOIN series ON series.id = outcomes.series "
            "WHERE name = ? AND outcomes.origin >= ? ORDER BY outcomes.origin, outcomes.revision"
        )
        return [Outcome(*row) for row in await self._select(query, series.name, since)]

    async def undelivered(self, sink: str, limit: int, size: int = 2**62) -> list[Record]:
        """A sink's first ``limit`` records; fewer if their values reach ``size`` bytes before."""
        query = (
            "SELECT sequence, kind, key, value, headers, created FROM outbox "
            "WHERE sink = ? ORDER BY sequence LIMIT ?"
        )

        def read() -> list[Record]:
            records, bytes_read = [], 0
            for row in self._db.connection.execute(query, (sink, limit)):
                records.append(_record(row))
                bytes_read += len(records[-1].value)
                if bytes_read >= size:
                    break
            return records

        return await self._db.read(read)

    async def mark_delivered(
        self, sink: str, through: int, dead_letters: Sequence[Envelope] = (), *, created: int = 0
    ) -> list[Record]:
        """Delete the records of a sink up to ``through`` and put dead letters into its outbox.

        through: sequence of the last delivered record; all earlier ones were delivered too.
        created: of the dead letters, UTC ms. Returns their records.
        """

        def replace() -> list[Record]:
            self._delete_records(sink, through)
            return [self._insert_record(sink, envelope, created) for envelope in dead_letters]

        return await self._db.write(replace)

    async def expire(self, sink: str, before: int, limit: int = _PRUNE_BATCH) -> tuple[int, int]:
        """Take out a sink's first records that were created before a time, ``limit`` at most.

        before: UTC ms. Returns how many, and the sequence of the last.
        """
        query = "SELECT sequence, created FROM outbox WHERE sink = ? ORDER BY sequence LIMIT ?"

        def expire() -> tuple[int, int]:
            rows = self._db.connection.execute(query, (sink, limit)).fetchall()
            old = [row[0] for row in takewhile(lambda row: row[1] < before, rows)]
            if not old:
                return 0, 0
            self._delete_records(sink, old[-1])
            return len(old), old[-1]

        return await self._db.write(expire)

    async def backlogs(self) -> dict[str, Backlog]:
        """What waits, by sink; those of which nothing waits are left out."""
        # `created` grows with `sequence`, but for steps of the clock; the index has all of it.
        query = "SELECT sink, count(*), min(created) FROM outbox GROUP BY sink"
        return {sink: Backlog(*rest) for sink, *rest in await self._select(query)}

    async def prune(self, keep: int, outcomes_before: int) -> None:
        """Forget bars beyond each series' newest ``keep``, and outcomes of older origins.

        Bars that still wait for their outcome stay, and ``keep`` before them.
        In small transactions, so that nobody waits long. outcomes_before: UTC ms.
        """
        bars = (
            "DELETE FROM bars WHERE series = ?1 AND time IN (SELECT time FROM bars "
            "WHERE series = ?1 AND time < (SELECT time FROM bars WHERE series = ?1 "
            "AND time <= (SELECT ifnull(origin, time) FROM series WHERE id = ?1) "
            "ORDER BY time DESC LIMIT 1 OFFSET ?2) ORDER BY time LIMIT ?3)"
        )
        outcomes = (
            "DELETE FROM outcomes WHERE series = ?1 AND (origin, revision) IN (SELECT origin, "
            "revision FROM outcomes WHERE series = ?1 AND origin < ?2 ORDER BY origin LIMIT ?3)"
        )
        for (series,) in await self._select("SELECT id FROM series"):
            for statement, most in ((bars, keep - 1), (outcomes, outcomes_before)):
                await self._delete(statement, series, most)
        # What an outage left free goes back to the disk; what comes and goes daily stays free.
        while (await self._select("PRAGMA freelist_count"))[0][0] > _MAX_FREE_PAGES:
            await self._select(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})")

    async def _delete(self, statement: str, series: int, most: int) -> None:
        arguments = (series, most, _PRUNE_BATCH)
        work = partial(self._db.connection.execute, statement, arguments)
        while (await self._db.write(lambda: work().rowcount)) == _PRUNE_BATCH:
            pass

    async def _select(self, query: str, *arguments: str | int) -> list[Any]:
        return await self._db.read(lambda: self._db.connection.execute(query, arguments).fetchall())

    def _insert_outcome(self, outcome: Outcome) -> None:
        series, sql = self._series_id(outcome.series), self._db.connection
        kept = sql.execute(
            "INSERT OR IGNORE INTO outcomes VALUES (?, ?, ?, ?, ?)", (series, *outcome[1:])
        )
        if not kept.rowcount:
            _log.error("a bar's second outcome is left out", **outcome._asdict())
        self._advance_watermark(series, outcome.origin, outcome.revision)

    def _upsert_bars(self, rows: Sequence[tuple[Series, Bar]]) -> None:
        self._db.connection.executemany(
            "INSERT OR REPLACE INTO bars VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    self._series_id(series.name),
                    *bar.candle,
                    bar.revision,
                    bar.synthetic,
                    bar.received,
                )
                for series, bar in rows
            ],
        )

    def _mark_relayed(self, series: Series, bar: Bar, *, triggers_forecast: bool) -> None:
        number, time = self._series_id(series.name), bar.candle.time
        self._db.connection.execute(
            "UPDATE series SET relayed = max(relayed, ?) WHERE id = ?", (time, number)
        )
        if triggers_forecast:
            self._advance_watermark(number, time, bar.revision)

    def _advance_watermark(self, series: int, origin: int, revision: int) -> None:
        self._db.connection.execute(
            "UPDATE series SET origin = ?1, revision = ?2 WHERE id = ?3 "
            "AND (origin IS NULL OR (origin, revision) < (?1, ?2))",
            (origin, revision, series),
        )

    def _insert_record(self, sink: str, envelope: Envelope, created: int) -> Record:
        kind, key, value, headers = envelope
        encoded = orjson.dumps([(name, text.decode()) for name, text in headers])
        cursor = self._db.connection.execute(
            "INSERT INTO outbox (sink, kind, key, value, headers, created) VALUES (?,?,?,?,?,?)",
            (sink, kind, key, value, encoded, created),
        )
        assert cursor.lastrowid is not None  # noqa: S101 - of an insert
        return Record(cursor.lastrowid, *envelope, created)

    def _delete_records(self, sink: str, through: int) -> None:
        self._db.connection.execute(
            "DELETE FROM outbox WHERE sink = ? AND sequence <= ?", (sink, through)
        )

    def _series_id(self, name: str) -> int:
        known = self._ids.get(name)
        if known is None:
            known = self._ids[name] = self._insert_series(name)
        return known

    def _insert_series(self, name: str) -> int:
        self._db.connection.execute("INSERT OR IGNORE INTO series (name) VALUES (?)", (name,))
        row = self._db.connection.execute(
            "SELECT id FROM series WHERE name = ?", (name,)
        ).fetchone()
        return int(row[0])


def _bar(row: tuple[Any, ...]) -> Bar:
    return Bar(Candle(*row[:7]), row[7], bool(row[8]), row[9])


def _record(row: tuple[Any, ...]) -> Record:
    sequence, kind, key, value, named, created = row
    headers = tuple((name, text.encode()) for name, text in orjson.loads(named))
    return Record(sequence, kind, key, value, headers, created)

"""State file: closed bars, outcomes and undelivered records in one SQLite database.

Each call is one transaction. An outcome, the watermark it moves and its records are in the same
one. If a power cut loses the last transactions, the bars are fetched and forecast again.
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
from kronos_stream.daemon.storage.database import Database
from kronos_stream.daemon.storage.schema import SCHEMA
from kronos_stream.interfaces.sink import Envelope, Record
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_BAR_COLUMNS = "time, open, high, low, close, volume, amount, revision, synthetic, received"
_PRUNE_BATCH = 2_000
"""Rows deleted per transaction; other callers wait no longer than that takes."""
_VACUUM_PAGES, _MAX_FREE_PAGES = 1_000, 4_000


class PublishedBar(NamedTuple):
    """A closed bar that is published for forecasting elsewhere."""

    series: Series
    bar: Bar
    triggers_forecast: bool
    """False for a bar of history, which only fills contexts."""


class Backlog(NamedTuple):
    """Undelivered records of a sink."""

    records: int
    oldest: int | None
    """Creation of the first of them, UTC ms."""


class State:
    """An open state file, created by :meth:`open`. Calls return after their commit.

    Every call may raise StateError. Then its transaction was rolled back, and the daemon must end.
    """

    def __init__(self, database: Database) -> None:
        self._db = database
        self._ids: dict[str, int] = {}
        database.on_rollback = self._ids.clear

    @property
    def path(self) -> Path:
        return self._db.path

    @classmethod
    async def open(cls, path: Path | None) -> Self:
        """Open or create the file and lock it; None opens a database in memory."""
        return cls(await Database.open(path, SCHEMA))

    async def close(self) -> None:
        """Merge the write-ahead log into the file and close it."""
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
        """Insert or replace bars."""
        await self._db.write(lambda: self._upsert_bars(rows))

    async def init_watermark(self, series: Series, origin: int) -> None:
        """Set the watermark of a series that has none: bars up to ``origin`` need no outcome."""
        statement = "UPDATE series SET origin = ? WHERE id = ? AND origin IS NULL"
        await self._db.write(
            lambda: self._db.connection.execute(statement, (origin, self._series_id(series.name)))
        )

    async def watermark(self, series: Series) -> tuple[int, int] | None:
        """Origin and revision of the newest bar with an outcome, or the initial watermark."""
        query = "SELECT origin, revision FROM series WHERE name = ? AND origin IS NOT NULL"
        rows = await self._select(query, series.name)
        return (rows[0][0], rows[0][1]) if rows else None

    async def last_relayed(self, series: Series) -> int:
        """Open of the newest published bar of a series, UTC ms; -1 if there is none."""
        rows = await self._select("SELECT relayed FROM series WHERE name = ?", series.name)
        return int(rows[0][0]) if rows else -1

    async def reset_relayed(self, names: Collection[str]) -> None:
        """Forget which bars of these series were published."""
        statement = "UPDATE series SET relayed = -1 WHERE name = ?"
        rows = [(name,) for name in names]
        await self._db.write(lambda: self._db.connection.executemany(statement, rows))

    async def followed_series(self) -> set[str]:
        """Names of the followed series, as of the last :meth:`set_followed`."""
        return {name for (name,) in await self._select("SELECT name FROM series WHERE followed")}

    async def set_followed(self, names: Collection[str]) -> None:
        """Record which series are followed."""

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
            self._upsert_bars([(series, bar) for series, bar, _ in bars])
            for series, bar, triggers_forecast in bars:
                self._mark_relayed(series, bar, triggers_forecast=triggers_forecast)
            return [
                (sink, self._insert_record(sink, envelope, created))
                for envelope in envelopes
                for sink in sinks
            ]

        return await self._db.write(record)

    async def outcomes(self, series: Series, since: int) -> list[Outcome]:
        """Outcomes of the bars that open at ``since``, UTC ms, or later."""
        query = (
            "SELECT name, outcomes.origin, outcomes.revision, result, reason FROM outcomes "
            "JOIN series ON series.id = outcomes.series "
            "WHERE name = ? AND outcomes.origin >= ? ORDER BY outcomes.origin, outcomes.revision"
        )
        return [Outcome(*row) for row in await self._select(query, series.name, since)]

    async def undelivered(self, sink: str, limit: int, size: int = 2**62) -> list[Record]:
        """First ``limit`` records of a sink; fewer if their values reach ``size`` bytes."""
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
        """Delete up to ``limit`` of a sink's first records that were created before a time.

        before: UTC ms. Returns their number and the last sequence.
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
        """Backlog by sink, of sinks with undelivered records."""
        # The index contains all columns of this query.
        query = "SELECT sink, count(*), min(created) FROM outbox GROUP BY sink"
        return {sink: Backlog(*rest) for sink, *rest in await self._select(query)}

    async def prune(self, keep: int, outcomes_before: int) -> None:
        """Delete all but the newest ``keep`` bars of each series, and old outcomes.

        Bars without an outcome stay, and ``keep`` bars before them. Small transactions keep the
        file available to others. outcomes_before: origin, UTC ms.
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
            for statement, bound in ((bars, keep - 1), (outcomes, outcomes_before)):
                delete = partial(self._delete_batch, statement, series, bound)
                while await self._db.write(delete) == _PRUNE_BATCH:
                    pass
        # Return to the disk what a long outage needed, but not what is reused daily.
        while (await self._select("PRAGMA freelist_count"))[0][0] > _MAX_FREE_PAGES:
            await self._select(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})")

    def _delete_batch(self, statement: str, series: int, bound: int) -> int:
        return self._db.connection.execute(statement, (series, bound, _PRUNE_BATCH)).rowcount

    async def _select(self, query: str, *arguments: str | int) -> list[Any]:
        return await self._db.read(lambda: self._db.connection.execute(query, arguments).fetchall())

    def _insert_outcome(self, outcome: Outcome) -> None:
        series, sql = self._series_id(outcome.series), self._db.connection
        inserted = sql.execute(
            "INSERT OR IGNORE INTO outcomes VALUES (?, ?, ?, ?, ?)", (series, *outcome[1:])
        )
        if not inserted.rowcount:
            _log.error("second outcome of a bar ignored", **outcome._asdict())
        self._advance_watermark(series, outcome.origin, outcome.revision)

    def _upsert_bars(self, rows: Sequence[tuple[Series, Bar]]) -> None:
        self._db.connection.executemany(
            "INSERT OR REPLACE INTO bars VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [(self._series_id(series.name), *bar.candle, *bar[1:]) for series, bar in rows],
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
            sql = self._db.connection
            sql.execute("INSERT OR IGNORE INTO series (name) VALUES (?)", (name,))
            row = sql.execute("SELECT id FROM series WHERE name = ?", (name,)).fetchone()
            known = self._ids[name] = int(row[0])
        return known


def _bar(row: tuple[Any, ...]) -> Bar:
    return Bar(Candle(*row[:7]), row[7], bool(row[8]), row[9])


def _record(row: tuple[Any, ...]) -> Record:
    sequence, kind, key, value, encoded, created = row
    headers = tuple((name, text.encode()) for name, text in orjson.loads(encoded))
    return Record(sequence, kind, key, value, headers, created)

"""The database of requests, an SQLite file or a PostgreSQL: its schema, and what is asked of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from serve_app.errors import ConfigError

TIMEOUT_S = 30
"""Seconds that a statement may take, or wait for another process's."""

_AT_ONCE = 1000
"""Requests of one statement."""

MOST_ROWS = 10_000
"""Rows of one answer."""

_LOCK = 0x5E12_7EA9_9000_0001
"""Number of an advisory lock in PostgreSQL, which is ours alone."""

_version = sa.Table(
    "serve_app_usage_schema", sa.MetaData(), sa.Column("version", sa.Integer, nullable=False)
)
_requests = sa.Table(
    "serve_app_usage",
    sa.MetaData(),
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("request_id", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("model_id", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("replica", sa.Text, nullable=False),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    # Both in UTC, without a zone: SQLite has none.
    sa.Column("day", sa.Date, nullable=False),
    sa.Column("arrived", sa.DateTime, nullable=False),
    sa.Column("queued_s", sa.Double, nullable=False),
    sa.Column("first_byte_s", sa.Double),
    sa.Column("duration_s", sa.Double, nullable=False),
    sa.Column("retries", sa.Integer, nullable=False),
    # None where no replica reported.
    sa.Column("prompt_tokens", sa.BigInteger),
    sa.Column("cached_tokens", sa.BigInteger),
    sa.Column("completion_tokens", sa.BigInteger),
    sa.Index("serve_app_usage_arrived", "arrived"),
    sa.Index("serve_app_usage_key_arrived", "key", "arrived"),
)

GROUPS = {name: _requests.c[name] for name in ("key", "model", "model_id", "day")}
"""What usage can be grouped by."""

_served = _requests.c.replica != ""


def _count(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.sum(sa.case((condition, 1), else_=0))


_SUMS: dict[str, sa.ColumnElement[int]] = {
    "requests": _count(_served),
    "refused": _count(sa.not_(_served)),
    "unreported": _count(_served & _requests.c.prompt_tokens.is_(None)),
    "prompt_tokens": sa.func.sum(_requests.c.prompt_tokens),
    "cached_tokens": sa.func.sum(_requests.c.cached_tokens),
    "completion_tokens": sa.func.sum(_requests.c.completion_tokens),
}


# The databases read the lines' JSON themselves. Python would need 50 µs for each row, in which the
# event loop, another thread of this process, could not go on.
_names = ", ".join(f'"{column.name}"' for column in _requests.columns)
_values = ", ".join(f"json_extract(value, '$.{column.name}')" for column in _requests.columns)
_INSERT = {
    "sqlite": f"INSERT INTO serve_app_usage ({_names}) SELECT {_values} FROM json_each(:rows) "
    "WHERE true ON CONFLICT (id) DO NOTHING",
    "postgresql": f"INSERT INTO serve_app_usage ({_names}) SELECT {_names} FROM "
    "json_populate_recordset(CAST(NULL AS serve_app_usage), CAST(:rows AS json)) "
    "ON CONFLICT (id) DO NOTHING",
}


def _first(connection: sa.Connection) -> None:
    _requests.create(connection)


MIGRATIONS = (_first,)
"""What leads from each version of the schema to the next; version 0 has no table of requests. A
step that was released stays as it is: once ``_requests`` changes, it creates a copy of the old."""


class Newer(Exception):
    """The schema is that of a later serve_app."""


class Database:
    """The requests' table. Any thread may use it.

    But for ``close``, its methods raise :class:`sqlalchemy.exc.SQLAlchemyError` or ``OSError``
    while it cannot be had, and :class:`Newer`.
    """

    def __init__(self, address: str) -> None:
        """No connection is made yet.

        Raises:
            ConfigError: PostgreSQL's driver is not installed, or the URL is none.
        """
        try:
            url = sa.make_url(address)
        except (sa.exc.ArgumentError, ValueError):  # whose text may have the password
            raise ConfigError(
                "usage_db is no URL; write special characters of its password as %2F and alike"
            ) from None
        self.file: Path | None = None
        """The SQLite file; None of a PostgreSQL."""

        options: dict[str, Any]
        if url.get_backend_name() == "sqlite":
            self.file = Path(str(url.database)).absolute()
            # Transactions begin below: Python's sqlite3 begins none for DDL, and others late.
            options = {"isolation_level": None, "timeout": TIMEOUT_S}
            # A connection that is kept would go on writing to a file that was deleted.
            pool: dict[str, Any] = {"poolclass": sa.NullPool}
            self._reading: tuple[str, ...] = ()
            self._writing: tuple[str, ...] = ("BEGIN IMMEDIATE",)
        else:
            require_driver()
            url = url.set(drivername="postgresql+psycopg")
            # What PgBouncer takes, too: neither settings of a session nor prepared statements.
            options = {
                "connect_timeout": 5,
                "tcp_user_timeout": TIMEOUT_S * 1000,  # ms
                "application_name": "serve_app",
                "prepare_threshold": None,
            }
            pool = {"pool_pre_ping": True}
            self._reading = (f"SET LOCAL statement_timeout = {TIMEOUT_S * 1000}",)  # ms
            self._writing = (*self._reading, f"SELECT pg_advisory_xact_lock({_LOCK})")
        ours = {key: value for key, value in options.items() if key not in url.query}
        self._engine = sa.create_engine(url, connect_args=ours, **pool)
        self._insert = sa.text(_INSERT[self._engine.dialect.name])
        self._is_prepared = False

    def prepare(self) -> None:
        """Bring the schema up to date, once.

        Raises:
            Newer: it is a later one than this serve_app knows.
        """
        if self._is_prepared:
            return
        if self.file:
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._transaction(()) as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")  # readers stop no writer
        with self._transaction(self._writing) as connection:
            _version.create(connection, checkfirst=True)
            version = connection.scalar(sa.select(_version.c.version))
            if version is None:
                connection.execute(sa.insert(_version).values(version=0))
                version = 0
            if version > len(MIGRATIONS):
                raise Newer(
                    f"its schema is version {version}, and this serve_app knows {len(MIGRATIONS)}; "
                    "upgrade serve_app, or name another database"
                )
            for step in MIGRATIONS[version:]:
                step(connection)
            connection.execute(sa.update(_version).values(version=len(MIGRATIONS)))
        self._is_prepared = True

    def insert(self, lines: Sequence[bytes]) -> None:
        """Insert the requests that are not there yet, all or none of them.

        ``lines`` are those of :mod:`serve_app.gateway.usage.line`.
        """
        self.prepare()
        with self._transaction(self._writing) as connection:
            for start in range(0, len(lines), _AT_ONCE):
                rows = b",".join(lines[start : start + _AT_ONCE]).decode()
                connection.execute(self._insert, {"rows": f"[{rows}]"})

    def totals(
        self, since: datetime, until: datetime, group_by: Sequence[str], key: str | None
    ) -> list[dict[str, Any]]:
        """The sums of the requests that arrived from ``since`` on and before ``until``, in UTC.

        ``group_by`` are some of :data:`GROUPS`; ``key`` restricts to one key's requests. There are
        :data:`MOST_ROWS` and one more where the answer has more than that.
        """
        by = [GROUPS[name] for name in group_by]
        asked = (
            sa.select(*by, *(column.label(name) for name, column in _SUMS.items()))
            .where(_requests.c.arrived >= since, _requests.c.arrived < until)
            .group_by(*by)
            .order_by(*by)
            .limit(MOST_ROWS + 1)
        )
        if key is not None:
            asked = asked.where(_requests.c.key == key)
        self.prepare()
        with self._transaction(self._reading) as connection:
            rows = connection.execute(asked).mappings().all()
        return [
            {name: row[name] for name in group_by} | {name: int(row[name] or 0) for name in _SUMS}
            for row in rows
        ]

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def _transaction(self, first: tuple[str, ...]) -> Iterator[sa.Connection]:
        with self._engine.connect() as connection:
            for statement in first:
                connection.exec_driver_sql(statement)
            try:
                yield connection
                connection.commit()
            except sa.exc.SQLAlchemyError:
                self._is_prepared = False  # somebody may have removed a table
                raise


def require_driver() -> None:
    """Raises ConfigError where PostgreSQL's driver cannot be imported."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise ConfigError(
            "usage_db is a PostgreSQL, and its driver is not installed; "
            "pip install 'serve-app[postgres]'"
        ) from None

"""Counts of searches, standings of runs, models, confirmations and measured costs."""

import json
from collections import Counter
from typing import Any

import sqlalchemy as sa
from alembic import op

from nas.store.rows import digest_of_model

revision = "0002"
down_revision = "0001"

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column(
        "searches", sa.Column("tally", sa.JSON(), nullable=False, server_default=sa.text("'{}'"))
    )
    op.add_column("trials", sa.Column("model", sa.String(length=64), nullable=True))
    op.add_column("trials", sa.Column("confirms", _BIG, nullable=True))
    op.add_column("trials", sa.Column("seconds_per_step", sa.Float(), nullable=True))
    op.add_column("trials", sa.Column("peak_memory_bytes", _BIG, nullable=True))
    op.create_table(
        "scopes",
        sa.Column("scope", sa.String(length=128), nullable=False),
        sa.Column("revision", _BIG, nullable=False),
        sa.Column("trials", _BIG, nullable=False),
        sa.Column("points", _BIG, nullable=False),
        sa.Column("searches", _BIG, nullable=False),
        sa.Column("least_flops", sa.Float(), nullable=True),
        sa.Column("greatest_flops", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("scope", name="pk_scopes"),
    )
    op.create_table(
        "standings",
        sa.Column("scope", sa.String(length=128), nullable=False),
        sa.Column("axis", sa.String(length=24), nullable=False),
        sa.Column("trial_id", _BIG, autoincrement=False, nullable=False),
        sa.Column("step", _BIG, autoincrement=False, nullable=False),
        sa.Column("dense", sa.Boolean(), nullable=False),
        sa.Column("model", _BIG, nullable=False),
        sa.Column("x", sa.Float(), nullable=False),
        sa.Column("loss", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["trial_id"], ["trials.id"], name="fk_standings_trial_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("scope", "axis", "trial_id", "step", name="pk_standings"),
    )
    op.create_table(
        "bars",
        sa.Column("scope", sa.String(length=128), nullable=False),
        sa.Column("axis", sa.String(length=24), nullable=False),
        sa.Column("dense", sa.Boolean(), nullable=False),
        sa.Column("size", _BIG, nullable=False),
        sa.Column("added", _BIG, nullable=False),
        sa.Column("edges", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("scope", "axis", "dense", name="pk_bars"),
    )
    _fill(op.get_bind())
    op.create_index("ix_trials_model", "trials", ["model"], unique=False)
    op.create_index("ix_trials_confirms", "trials", ["confirms"], unique=False)


def _fill(connection: sa.Connection) -> None:
    """Counts and models of what is stored already."""
    tallies: dict[str, Counter[str]] = {}
    counted = sa.text(
        "SELECT search_id, state, kind, count(*) FROM trials GROUP BY search_id, state, kind"
    )
    for search, state, kind, count in connection.execute(counted):
        tally = tallies.setdefault(search, Counter())
        tally[state] += count
        tally["references"] += count if kind == "reference" else 0
    for search, tally in tallies.items():
        connection.execute(
            sa.text("UPDATE searches SET tally = :tally WHERE id = :id"),
            {"tally": json.dumps({k: n for k, n in sorted(tally.items()) if n}), "id": search},
        )
    stored = sa.text(
        "SELECT t.id, s.id AS search, s.task_fingerprint, t.depth, t.width, t.structures "
        "FROM trials t JOIN searches s ON s.id = t.search_id "
        "WHERE t.id > :last ORDER BY t.id LIMIT 5000"
    )
    fill = sa.text("UPDATE trials SET model = :model WHERE id = :id")
    last = -1
    while rows := connection.execute(stored, {"last": last}).all():
        connection.execute(fill, [{"id": row.id, "model": _model(row)} for row in rows])
        last = rows[-1].id
    # a worker of the version before would complete trials without entering them in the standings
    connection.execute(sa.text("UPDATE searches SET epoch = epoch + 1 WHERE state = 'running'"))


def _model(row: sa.Row[Any]) -> str:
    structures = row.structures
    if isinstance(structures, str):  # PostgreSQL has decoded its JSON, SQLite has not
        structures = json.loads(structures)
    return digest_of_model(row.task_fingerprint or row.search, row.depth, row.width, structures)


def downgrade() -> None:
    op.drop_table("bars")
    op.drop_table("standings")
    op.drop_table("scopes")
    op.drop_index("ix_trials_confirms", table_name="trials")
    op.drop_index("ix_trials_model", table_name="trials")
    for column in ("peak_memory_bytes", "seconds_per_step", "confirms", "model"):
        op.drop_column("trials", column)
    op.drop_column("searches", "tally")

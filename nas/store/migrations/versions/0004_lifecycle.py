"""Tenants, priorities, pauses, limits, reasons of failure, processes, and a log that only grows."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_REFUSED = "events are append-only"


def upgrade() -> None:
    with op.batch_alter_table("searches") as searches:
        searches.add_column(
            sa.Column("tenant", sa.String(64), nullable=False, server_default=sa.text("'default'"))
        )
        searches.add_column(_counter("priority"))
        searches.add_column(
            sa.Column("pause_requested", sa.Boolean(), nullable=False, server_default=sa.false())
        )
        searches.add_column(sa.Column("failure", sa.String(16), nullable=True))
        searches.add_column(sa.Column("limit_reached", sa.String(255), nullable=True))
        searches.add_column(_counter("stale_writes"))
        searches.add_column(sa.Column("claimed_at", sa.Float(), nullable=True))
        searches.add_column(
            sa.Column("held_seconds", sa.Float(), nullable=False, server_default=sa.text("0"))
        )
        searches.add_column(sa.Column("cloned_from", sa.String(32), nullable=True))
        searches.drop_constraint("uq_searches_idempotency_key", type_="unique")
        searches.create_unique_constraint(
            "uq_searches_tenant_idempotency_key", ["tenant", "idempotency_key"]
        )
    op.execute(
        "UPDATE searches SET failure = 'attempts' "
        "WHERE state = 'failed' AND error LIKE 'gave up after %'"
    )
    op.create_index("ix_standings_trial_id", "standings", ["trial_id"])
    op.add_column("trials", sa.Column("failure", sa.String(16), nullable=True))
    op.create_table(
        "processes",
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("pid", _BIG, nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("search_id", sa.String(32), nullable=True),
        sa.Column("about", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_processes"),
    )
    if op.get_bind().dialect.name == "sqlite":
        op.execute(
            "CREATE TRIGGER events_append_only BEFORE UPDATE ON events "
            f"BEGIN SELECT RAISE(ABORT, '{_REFUSED}'); END"
        )
    else:
        op.execute(
            "CREATE FUNCTION events_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{_REFUSED}'; END $$"
        )
        op.execute(
            "CREATE TRIGGER events_append_only BEFORE UPDATE ON events "
            "FOR EACH ROW EXECUTE FUNCTION events_append_only()"
        )


def _counter(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), nullable=False, server_default=sa.text("0"))


def downgrade() -> None:
    op.execute(
        "DROP TRIGGER events_append_only"
        + ("" if op.get_bind().dialect.name == "sqlite" else " ON events")
    )
    if op.get_bind().dialect.name != "sqlite":
        op.execute("DROP FUNCTION events_append_only()")
    op.drop_table("processes")
    op.drop_index("ix_standings_trial_id", table_name="standings")
    op.drop_column("trials", "failure")
    with op.batch_alter_table("searches") as searches:
        searches.drop_constraint("uq_searches_tenant_idempotency_key", type_="unique")
        searches.create_unique_constraint("uq_searches_idempotency_key", ["idempotency_key"])
        for column in (
            "tenant", "priority", "pause_requested", "failure", "limit_reached", "stale_writes",
            "claimed_at", "held_seconds", "cloned_from",
        ):  # fmt: skip
            searches.drop_column(column)

"""Runs that train in slices, what they have trained, and the rounds of a search."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_OF_TRIALS = ("trained_steps", "charged_steps")


def upgrade() -> None:
    op.add_column("trials", sa.Column("until_step", _BIG, nullable=True))
    for name in _OF_TRIALS:
        zero = sa.text("0")
        op.add_column("trials", sa.Column(name, _BIG, nullable=False, server_default=zero))
    op.add_column(
        "searches", sa.Column("rounds", sa.Integer(), nullable=False, server_default=sa.text("0"))
    )
    # a run was charged whole for each attempt, and has trained up to its last evaluation
    op.execute("UPDATE trials SET charged_steps = steps * attempts WHERE attempts > 0")
    last = "SELECT MAX(points.step) FROM points WHERE points.trial_id = trials.id"
    op.execute(
        f"UPDATE trials SET trained_steps = COALESCE(({last}), 0) "
        "WHERE reused_from IS NULL AND state IN ('complete', 'stopped', 'failed')"
    )


def downgrade() -> None:
    # versions before know no paused runs: they begin anew
    op.execute("UPDATE trials SET state = 'planned' WHERE state = 'paused'")
    op.drop_column("searches", "rounds")
    for name in (*_OF_TRIALS, "until_step"):
        op.drop_column("trials", name)

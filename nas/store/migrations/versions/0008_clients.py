"""Trials that clients train, what they tell of them, and who is told of a search's events."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "offers",
        sa.Column(
            "trial_id", _BIG, sa.ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column(
            "search_id", sa.String(32), sa.ForeignKey("searches.id", ondelete="CASCADE"),
            nullable=False, index=True,
        ),
        sa.Column("holder", sa.String(128)),
        sa.Column("token", sa.String(64)),
        sa.Column("lease_seconds", sa.Float()),
        sa.Column("lease_until", sa.Float()),
        sa.Column("outcome", sa.String(16)),
        sa.Column("error", sa.String(4096)),
        sa.Column("settled", sa.Boolean(), nullable=False),
    )  # fmt: skip
    op.create_table(
        "told",
        sa.Column(
            "trial_id", _BIG, sa.ForeignKey("offers.trial_id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("step", _BIG, primary_key=True),
        sa.Column("loss", sa.Float(), nullable=False),
        sa.Column("loss_stderr", sa.Float(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("losses", sa.LargeBinary(), nullable=False),
        sa.Column("taken", sa.Boolean(), nullable=False),
    )  # fmt: skip
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("tenant", sa.String(64), nullable=False, index=True),
        sa.Column("url", sa.String(2048), nullable=False),
        sa.Column("secret", sa.String(64), nullable=False),
        sa.Column("events", sa.JSON(), nullable=False),
        sa.Column("private", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", _BIG, primary_key=True, autoincrement=True),
        sa.Column(
            "webhook_id", sa.String(16), sa.ForeignKey("webhooks.id", ondelete="CASCADE"),
            nullable=False, index=True,
        ),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_at", sa.Float(), index=True),
        sa.Column("delivered_at", sa.Float()),
        sa.Column("error", sa.String(512)),
    )  # fmt: skip


def downgrade() -> None:
    op.drop_table("deliveries")
    op.drop_table("webhooks")
    op.drop_table("told")
    op.drop_table("offers")

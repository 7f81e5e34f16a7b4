"""Trials that processes of a user's own ask for, and what they tell of them."""

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


def downgrade() -> None:
    op.drop_table("told")
    op.drop_table("offers")

"""Weights of the best runs."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "weights",
        sa.Column(
            "trial_id", _BIG, sa.ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True,
            autoincrement=False,
        ),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("bytes", _BIG, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
    )  # fmt: skip
    op.create_table(
        "weights_parts",
        sa.Column(
            "trial_id", _BIG, sa.ForeignKey("weights.trial_id", ondelete="CASCADE"),
            primary_key=True, autoincrement=False,
        ),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
    )  # fmt: skip


def downgrade() -> None:
    op.drop_table("weights_parts")
    op.drop_table("weights")

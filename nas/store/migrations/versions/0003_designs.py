"""Designs that seven exponents do not say: mixtures, three and more factors, convolutions."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("trials", sa.Column("design", sa.String(length=2048), nullable=True))


def downgrade() -> None:
    op.drop_column("trials", "design")

"""What people call a search: name, tags and notes, and whether it is archived."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("searches", sa.Column("name", sa.String(120), nullable=True))
    op.add_column(
        "searches", sa.Column("tags", sa.JSON(), nullable=False, server_default=sa.text("'[]'"))
    )
    op.add_column("searches", sa.Column("notes", sa.String(4000), nullable=True))
    op.add_column(
        "searches", sa.Column("archived", sa.Boolean(), nullable=False, server_default=sa.false())
    )


def downgrade() -> None:
    for name in ("archived", "notes", "tags", "name"):
        op.drop_column("searches", name)

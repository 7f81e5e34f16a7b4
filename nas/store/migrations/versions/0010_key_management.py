"""Keys that keys have made, each once for an Idempotency-Key, and accounts of a provider."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    with op.batch_alter_table("api_keys") as keys:
        keys.add_column(sa.Column("created_by", sa.String(16), nullable=True))
        keys.add_column(sa.Column("idempotency_key", sa.String(255), nullable=True))
        keys.add_column(sa.Column("request_digest", sa.String(64), nullable=True))
        keys.add_column(sa.Column("subject", sa.String(64), nullable=True))
        keys.create_unique_constraint("uq_api_keys_subject", ["subject"])
        keys.create_unique_constraint(
            "uq_api_keys_tenant_idempotency_key", ["tenant", "idempotency_key"]
        )


def downgrade() -> None:
    # for earlier versions an account would be a key
    op.execute("DELETE FROM api_keys WHERE subject IS NOT NULL")
    # earlier versions know no scope `keys`, and refuse to read a key that has it
    op.execute("DELETE FROM api_keys WHERE scopes = 'keys'")
    op.execute("UPDATE api_keys SET scopes = REPLACE(scopes, ',keys', '')")
    with op.batch_alter_table("api_keys") as keys:
        keys.drop_constraint("uq_api_keys_subject", type_="unique")
        keys.drop_column("subject")
        keys.drop_constraint("uq_api_keys_tenant_idempotency_key", type_="unique")
        keys.drop_column("request_digest")
        keys.drop_column("idempotency_key")
        keys.drop_column("created_by")

"""API keys, quotas of tenants, an audit log that only grows, and answers of each tenant's own."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_REFUSED = "the audit log is append-only"
#: Seconds, 90 days, for which not even retention deletes a row.
_YOUNG = 7_776_000


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("scopes", sa.String(64), nullable=False),
        sa.Column("parent", sa.String(16), nullable=True),
        sa.Column("rotated_from", sa.String(16), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=True),
        sa.Column("revoked_at", sa.Float(), nullable=True),
        sa.Column("used_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("digest", name="uq_api_keys_digest"),
    )
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("searches", sa.Integer(), nullable=True),
        sa.Column("train_flops", sa.Float(), nullable=True),
        sa.Column("concurrency", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_tenants"),
    )
    op.create_table(
        "audit",
        sa.Column("id", _BIG, autoincrement=True, nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=True),
        sa.Column("key_id", sa.String(16), nullable=True),
        sa.Column("action", sa.String(128), nullable=False),
        sa.Column("target", sa.String(128), nullable=True),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("reason", sa.String(255), nullable=True),
        sa.Column("address", sa.String(64), nullable=True),
        sa.Column("request_id", sa.String(128), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    with op.batch_alter_table("searches") as searches:
        # what ran before there were quotas counts against none
        searches.add_column(
            sa.Column("charged_flops", sa.Float(), nullable=False, server_default=sa.text("0"))
        )
        searches.add_column(sa.Column("data_root", sa.String(4096), nullable=True))
    op.create_index("ix_searches_tenant_sequence", "searches", ["tenant", "sequence"])
    # answers about a task are of one tenant from now on: they are built anew where there are others
    op.execute(
        "UPDATE scopes SET revision = 0 WHERE scope = '*' "
        "AND EXISTS (SELECT 1 FROM searches WHERE tenant <> 'default')"
    )
    _append_only()


def _append_only() -> None:
    if op.get_bind().dialect.name == "sqlite":
        age = "(julianday('now') - 2440587.5) * 86400.0 - OLD.created_at"
        op.execute(
            "CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit "
            f"BEGIN SELECT RAISE(ABORT, '{_REFUSED}'); END"
        )
        op.execute(
            f"CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit WHEN {age} < {_YOUNG} "
            f"BEGIN SELECT RAISE(ABORT, '{_REFUSED}'); END"
        )
        return
    age = "EXTRACT(EPOCH FROM clock_timestamp()) - OLD.created_at"
    op.execute(
        "CREATE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF TG_OP = 'DELETE' AND {age} >= {_YOUNG} THEN RETURN OLD; END IF; "
        f"RAISE EXCEPTION '{_REFUSED}'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE ON audit "
        "FOR EACH ROW EXECUTE FUNCTION audit_append_only()"
    )
    op.execute(
        "CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only()"
    )


def downgrade() -> None:
    op.drop_table("audit")
    if op.get_bind().dialect.name != "sqlite":
        op.execute("DROP FUNCTION audit_append_only()")
    op.drop_table("tenants")
    op.drop_table("api_keys")
    op.drop_index("ix_searches_tenant_sequence", table_name="searches")
    with op.batch_alter_table("searches") as searches:
        searches.drop_column("data_root")
        searches.drop_column("charged_flops")
    op.execute(
        "UPDATE scopes SET revision = 0 WHERE scope = '*' "
        "AND EXISTS (SELECT 1 FROM searches WHERE tenant <> 'default')"
    )

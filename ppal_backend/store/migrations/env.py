"""Alembic's entry: runs the steps on the connection that ``store/database.py`` opened and locked."""

from alembic import context

from ppal_backend.store.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()

"""The state database's schema, one step per release that changed it (Alembic); see ``store/database.py``."""

#!/bin/sh
# Run by the postgres image when its volume is empty: a database and a role of its own for the backend.
set -eu
psql -v ON_ERROR_STOP=1 -v password="$PPAL_DB_PASSWORD" --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
CREATE ROLE ppal LOGIN PASSWORD :'password';
CREATE DATABASE ppal OWNER ppal;
SQL

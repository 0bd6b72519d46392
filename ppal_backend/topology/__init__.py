"""What docker-compose.yml starts, without Docker: servers of the system's packages, for testing."""

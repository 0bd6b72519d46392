"""Label Studio, PostgreSQL, Redis and the backend as processes, for the demo, the tests and the benchmarks."""

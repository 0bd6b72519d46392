.DEFAULT_GOAL := help
PYTHON_BIN := .venv/bin/python
# The files of tests are spread over the processors; those of one file share what they have built.
PYTEST := $(PYTHON_BIN) -m pytest -n logical --maxprocesses 4 --dist loadfile --max-worker-restart 0
# Ray's driver bears one cluster a process; the image and the Compose test build in the same place.
ALONE := tests/engines/test_ray_engine.py tests/engines/test_ray_steps.py tests/faults/test_ray.py tests/image
ARGS ?=

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## both virtual environments (a second run does nothing)
	@scripts/setup.sh

demo: setup ## Label Studio, the backend and two rounds of labeling; ARGS=--exit stops after them
	@$(PYTHON_BIN) -m ppal_backend.cli demo $(ARGS)

test: setup ## every test but the slow ones, on a real Label Studio
	@$(PYTEST) $(ARGS)

test-all: setup setup-ray setup-s3 ## every test
	@$(PYTEST) -m "" $(addprefix --ignore ,$(ALONE)) $(ARGS)
	@set -e; for part in $(ALONE); do $(PYTHON_BIN) -m pytest -m "" $$part; done

check: setup-backend ## lint, types and the tests that need no Label Studio
	@$(PYTHON_BIN) -m ruff check .
	@$(PYTHON_BIN) -m ruff format --check .
	@$(PYTHON_BIN) -m mypy
	@$(PYTEST) -m "not slow and not e2e and not faults and not servers and not image and not gpu"

bench: setup ## benchmarks (docs/benchmarks.md); ARGS="service --json" runs one
	@$(PYTHON_BIN) -m benchmarks $(ARGS)

gpu-check: ## figures on a GPU (docs/gpu.md); ends at once where there is none
	@scripts/gpu_check.sh --out gpu-check.json $(ARGS)

audit: setup-backend ## bill of materials in build/, and known vulnerabilities of every pinned version
	@$(PYTHON_BIN) scripts/audit.py $(ARGS)

setup-backend:
	@scripts/setup.sh backend

setup-ray:
	@scripts/setup.sh ray

setup-s3:
	@scripts/setup.sh s3

clean: ## environments, caches and the demo's files; the compiled mmcv wheel stays in ~/.cache/ppal
	rm -rf .venv .venv-label-studio demo-run build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup setup-backend setup-ray setup-s3 demo test test-all check bench gpu-check audit clean

"""``python -m tests.faults.worker_process PARALLEL``: a worker whose rounds are those of ``round_process``."""

import sys

from ppal_backend.logs import configure_logging
from ppal_backend.settings import load_settings
from ppal_backend.worker.worker import run_worker

if __name__ == "__main__":
    settings = load_settings()
    configure_logging(settings.log_level)
    run_worker(settings, parallel_rounds=int(sys.argv[1]), round_module="tests.faults.round_process")

"""A worker process of Beam on this machine, without messages that are of no use.

Beam's own worker writes to standard error about BigQuery, which it cannot reach, and about its
start, whatever its options are. Errors in the work reach the process that started it.
"""

import logging
import os
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent handles it
logging.disable(logging.WARNING)
from apache_beam.runners.worker import sdk_worker_main  # noqa: E402

if __name__ == "__main__":
    sys.stderr = open(os.devnull, "w")  # it prints the traceback that it sends
    sdk_worker_main.main(sys.argv)

"""A worker process of Beam on this machine, which keeps to itself what helps nobody.

Beam's own tells on standard error of BigQuery, which it cannot talk to, and of its own beginnings,
whatever its options say. What goes wrong in the work reaches the process that started it.
"""

import logging
import os
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the starter has the word
logging.disable(logging.WARNING)
from apache_beam.runners.worker import sdk_worker_main  # noqa: E402

if __name__ == "__main__":
    sys.stderr = open(os.devnull, "w")  # it prints the traceback that it sends
    sdk_worker_main.main(sys.argv)

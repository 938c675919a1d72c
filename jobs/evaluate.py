"""Measure a model on the held-out events.

As a Ray job: ray job submit --working-dir . -- python jobs/evaluate.py [the options of pixrec evaluate]
"""

import sys

from pixrec.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))

"""Rank the catalog for one history.

As a Ray job: ray job submit --working-dir . -- python jobs/recommend.py [the options of pixrec recommend]
"""

import sys

from pixrec.cli import main

if __name__ == "__main__":
    sys.exit(main(["recommend", *sys.argv[1:]]))

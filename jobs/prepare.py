"""Make a prepared data set from item and interaction tables.

As a Ray job: ray job submit --working-dir . -- python jobs/prepare.py [the options of pixrec prepare]
"""

import sys

from pixrec.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))

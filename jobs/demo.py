"""Make the synthetic catalog and run every verb on it.

As a Ray job: ray job submit --working-dir . -- python jobs/demo.py [the options of pixrec demo]
"""

import sys

from pixrec.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))

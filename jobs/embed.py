"""Turn a catalog into an index of item vectors.

As a Ray job: ray job submit --working-dir . -- python jobs/embed.py [the options of pixrec embed]
"""

import sys

from pixrec.cli import main

if __name__ == "__main__":
    sys.exit(main(["embed", *sys.argv[1:]]))

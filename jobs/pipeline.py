"""Prepare, train, embed, evaluate, and publish unless the new model may be worse.

As a Ray job: ray job submit --working-dir . -- python jobs/pipeline.py [the options of pixrec pipeline]
"""

import sys

from pixrec.cli import main

if __name__ == "__main__":
    sys.exit(main(["pipeline", *sys.argv[1:]]))

"""Fine-tune the towers on a prepared data set.

As a Ray job: ray job submit --working-dir . -- python jobs/train.py [the options of pixrec train]
"""

import sys

from pixrec.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

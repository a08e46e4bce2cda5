"""`python -m mgd_timm`, and `accelerate launch -m mgd_timm`: the command line."""

import sys

from mgd_timm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m rwalk` is the command line."""

import sys

from rwalk.cli import main

sys.exit(main())

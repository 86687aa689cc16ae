"""`python -m rwalk` is the command line."""

import sys

from rwalk.cli.main import main

sys.exit(main())

"""`python -m hvkvm`, for a checkout that is not installed."""

import sys

from hvkvm.cli import main

sys.exit(main())

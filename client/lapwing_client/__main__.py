"""`python -m lapwing_client` is `lapwing`."""

import sys

from lapwing_client.cli import main

if __name__ == "__main__":
    sys.exit(main())

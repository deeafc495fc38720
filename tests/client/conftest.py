"""The tests of the client talk to real servers; their fakes lie with the server's tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "server"))

"""The command line with timings of half a second instead of eight: `brief_gossamer.py optimize ...`.

Everything else is the real command. A test kills it twenty times, and no verdict of that test hangs on a latency.
"""

from __future__ import annotations

import sys

from gossamer.cli import main
from gossamer.measure.latency import time_in_turns

if __name__ == "__main__":
    assert time_in_turns.__kwdefaults__ is not None
    time_in_turns.__kwdefaults__.update(budget_seconds=0.5, round_seconds=0.02)
    sys.exit(main())

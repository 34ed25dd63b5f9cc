"""The command line: one short file a command; each reads its options, calls `gossamer.api`, and prints the answer."""

from gossamer.cli.main import main

__all__ = ["main"]

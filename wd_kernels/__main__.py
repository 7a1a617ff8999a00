"""`python -m wd_kernels`: the self-check, and the other commands."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from .version import __version__

__all__ = ["COMMANDS", "main"]

#: Each is a module of `commands`, with HELP, add_arguments(parser) and run(arguments), which is imported when it is
#: asked for; and what the list of commands says of it.
COMMANDS = {
    "check": "what is installed, what was chosen, and does it compute right (the default)",
    "bench": "time a step on this machine, beside torch's fused class, on the shapes of a model",
    "plan": "bytes, memory and predicted time of a step, for a model, storage formats and a GPU",
    "convert": "carry a saved optimizer state to another library or decay mode",
}
EXAMPLES = """examples:
  python -m wd_kernels
  python -m wd_kernels bench --model gpt2
  python -m wd_kernels plan --model llama-8b --shard 64 --gpu h200
  python -m wd_kernels bench --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, the self-check where none is named; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    shown = "\n".join(f"  {name:<9} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m wd_kernels", usage="%(prog)s [--version] [command] ...",
        description=f"Fused steps for PyTorch.\n\ncommands:\n{shown}", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"wd_kernels {__version__}")
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), default="check", help=argparse.SUPPRESS)
    # Of what follows a command its own parser is the judge: only that command's module is imported.
    name = parser.parse_args(given[:1]).command
    command: Any = importlib.import_module(f".commands.{name}", __package__)
    own = argparse.ArgumentParser(
        prog=f"python -m wd_kernels {name}", description=command.HELP,
        epilog=getattr(command, "EXAMPLES", None), formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_arguments(own)
    status: int = command.run(own.parse_args(given[1:]))
    return status


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough: ended as by SIGPIPE, since 1 would say that a backend is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + 13
    sys.exit(status)

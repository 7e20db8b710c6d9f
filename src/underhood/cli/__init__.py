"""The command line: `underhood COMMAND ...`.

One file per command, and each only parses, calls the library function that a Python user would
call, and shows what came back. Nothing heavy is imported before a command needs it, so `--help`
answers at once. Results go to stdout, notes and progress to stderr; a table is drawn for a
terminal, and tab-separated values are written to a pipe.

Exit codes: 0 all right, 1 the run failed, 2 the call was wrong, 3 this model has no such thing,
130 interrupted.
"""

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; does not return."""
    _hush()
    try:
        from underhood.cli.app import app

        app()
    except KeyboardInterrupt:  # while the commands themselves were being imported
        sys.exit(130)


def _hush() -> None:
    """Keep the libraries below from writing on stderr; a setting of the user's own stays."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        import warnings

        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)

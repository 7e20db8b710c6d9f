"""`python -m underhood.cli`, for when the script is not on the path."""

from underhood.cli import main

main()

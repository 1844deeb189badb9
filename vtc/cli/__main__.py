"""`python -m vtc.cli`."""

from vtc.cli import main

main()

"""`python -m vtc`, which torchrun and accelerate launch can start."""

from vtc.cli import main

main()

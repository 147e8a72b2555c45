"""`python -m transnormer` is the command line."""

from .cli import main

main()

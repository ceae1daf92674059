"""`python -m normwright` is the `normwright` command."""

from .cli import main

main()

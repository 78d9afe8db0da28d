"""`python -m amlmount`: the command line."""

from amlmount.cli import main

main()

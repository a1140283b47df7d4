"""`python -m kbit`, where the command `kbit` is not on the path."""

from kbit.cli.main import main

main()

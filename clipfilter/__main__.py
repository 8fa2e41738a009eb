"""`python -m clipfilter`: the command line."""

from clipfilter.cli.main import main

main()

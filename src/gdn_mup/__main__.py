"""`python -m gdn_mup` is the command `gdn-mup`."""

from gdn_mup.cli import main

main()

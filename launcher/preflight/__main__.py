"""``python -m launcher.preflight``, which is how torchrun starts it: see launcher/preflight/command.py."""

import sys

from launcher import cli

sys.exit(cli.main(["preflight", *sys.argv[1:]]))

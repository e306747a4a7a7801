"""`python -m openneutron.dropin script.py [ARGUMENT ...]`."""

import sys

from openneutron.dropin import main

main(sys.argv[1:])

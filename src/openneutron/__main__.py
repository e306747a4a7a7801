"""`python -m openneutron` is the command line."""

from openneutron.cli import main

if __name__ == "__main__":
    main()

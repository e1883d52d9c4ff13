"""`python -m kvmkit`: the command line, for an interpreter whose scripts are not on the path."""

from kvmkit.cli import main

if __name__ == "__main__":
    main()

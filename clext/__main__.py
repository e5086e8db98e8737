"""`python -m clext` is the same as the `clext` command."""

from clext.cli import main

if __name__ == "__main__":
    main()

"""`python -m densegeo` is the `densegeo` command."""

from densegeo.cli import main

if __name__ == "__main__":
    main()

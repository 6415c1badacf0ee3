"""Entry point of `python -m ctxext`, for systems where the command is not on the PATH."""

from ctxext.cli import main

if __name__ == "__main__":
    main()

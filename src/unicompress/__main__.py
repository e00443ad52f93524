"""`python -m unicompress` is the command `unicompress`."""

from unicompress.cli import main

if __name__ == "__main__":
    main()

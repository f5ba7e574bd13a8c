"""`python -m instructft` is the same as the command `instructft`."""

from instructft.cli import main

if __name__ == "__main__":
    main()

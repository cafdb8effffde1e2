"""`python -m flextok_pl` is the `flextok` command."""

from flextok_pl.cli import main

if __name__ == "__main__":
    main()

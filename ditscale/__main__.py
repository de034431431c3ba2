"""``python -m ditscale`` is the ``ditscale`` command."""

from ditscale.cli import main

if __name__ == "__main__":
    main()

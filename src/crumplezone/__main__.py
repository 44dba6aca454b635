"""``python -m crumplezone``: the command line, also where its script is not on the PATH."""

from crumplezone.cli.app import main

if __name__ == "__main__":
    main()

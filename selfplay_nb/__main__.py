"`python -m selfplay_nb`: the command line of `selfplay_nb.cli`."

from selfplay_nb.cli import main

if __name__ == "__main__":
    main()

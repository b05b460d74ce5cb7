"""`python -m fewstep`, and what `accelerate launch -m fewstep` runs."""

from fewstep.cli import main

if __name__ == "__main__":
    main()

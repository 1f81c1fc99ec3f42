"""Runs the command `stable-diffusion`: `python -m stable_diffusion`."""

import sys

from stable_diffusion.command.generate import main

if __name__ == "__main__":
    sys.exit(main())

"""Runs the command `stable-diffusion`."""

import sys

from stable_diffusion.command.generate import main

sys.exit(main())

from stable_diffusion.checkpoints.config import *  # noqa

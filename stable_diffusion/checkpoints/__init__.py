"""Where parameters come from and go to: presets, folders and files, one module for each format.

formats.py            the table of formats: opening and saving a checkpoint
diffusers.py          a folder in diffusers' layout, on disk or on the hub
original.py           one file in the original layout
kerascv.py            folders of .h5 files, KerasCV's and Keras 3's
openvino.py           a folder of models that OpenVINO runs
diffusers_config.py   configs in diffusers' words, which all formats carry
layout.py names.py    how formats name parameters, and the names that they share
tensors.py            files of named tensors, compared with a model before anything is assigned
hub.py                downloads
reader.py building.py the base of all readers; models without random numbers
changes.py            what a pipeline changed since loading
"""

from stable_diffusion.checkpoints.formats import FORMATS, open_checkpoint, save_checkpoint
from stable_diffusion.checkpoints.reader import Reader, release

__all__ = ["FORMATS", "Reader", "open_checkpoint", "release", "save_checkpoint"]

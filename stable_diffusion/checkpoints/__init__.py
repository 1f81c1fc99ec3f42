"""Checkpoints: opening and saving the parameters of a pipeline, one module for each format.

README.md beside this file says which formats there are and which to use.

    formats.py           the table of formats; opens and saves a checkpoint
    diffusers.py         folders in diffusers' layout, on disk or on the hub
    original.py          single files in the original layout
    kerascv.py           folders of .h5 files: KerasCV's, and Keras 3's .weights.h5
    openvino.py          folders of models that OpenVINO runs
    diffusers_config.py  diffusers' config files, which all formats use to describe a model
    layout.py            how a format names the parameters of a model
    names.py             names that several formats share
    tensors.py           files of named tensors: opens, compares, loads and writes them
    torch_files.py       PyTorch's files: reads their tensors and runs nothing
    contents.py          tells what a file is
    hub.py               downloads
    reader.py            the base class of all readers
    building.py          builds models without random numbers
    changes.py           remembers parameters that a pipeline changed after loading
"""

from stable_diffusion.checkpoints.formats import (
    FORMATS,
    check_target,
    open_checkpoint,
    save_checkpoint,
)
from stable_diffusion.checkpoints.reader import Reader, release

__all__ = ["FORMATS", "Reader", "check_target", "open_checkpoint", "release", "save_checkpoint"]

"""The commands that a shell runs: one file for each, and what they share.

generate.py     stable-diffusion: generates images from prompts
convert.py      stable-diffusion-convert: converts a checkpoint from any format to any other
finetune.py     stable-diffusion-finetune: fine-tunes on a folder of images
arguments.py    the parser, types of arguments, and the names that arguments may have
terminal.py     what the commands print, and their exit status
png.py          images as PNG files, with text that says how they were generated

Nothing here imports Keras before the arguments are parsed, so that `--help` answers at once.
"""

"""What a shell runs: one file a command, and what they share. Keras is imported late.

generate.py     stable-diffusion: generates images from prompts
convert.py      stable-diffusion-convert: converts a checkpoint from any format to any other
finetune.py     stable-diffusion-finetune: fine-tunes on a folder of images
arguments.py    types of arguments, and the parser that says what is wrong in one line
terminal.py     what a command prints, and its exit status
png.py          images as PNG files, with text on how they were made
"""

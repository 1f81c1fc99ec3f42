"""Small fine-tunings on top of a checkpoint: how each is read, applied, undone and written.

lora.py         LoRA: small matrices, added to kernels
embedding.py    textual inversion: vectors of a new word
"""

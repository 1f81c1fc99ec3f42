"""Adapters: small fine-tunings on top of a checkpoint. Each is read, applied, undone and written.

lora.py         LoRA: small matrices that are added to kernels
embedding.py    textual inversion: vectors of a new word
"""

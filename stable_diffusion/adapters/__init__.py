"""Adapters: small fine-tunings on top of a checkpoint. Each is read, applied, undone and written.

lora.py         LoRA: small matrices that are added to kernels
lora_kinds.py   what each kind of LoRA adds
lora_lists.py   LoRAs without names
embedding.py    textual inversion: vectors of a new word
"""

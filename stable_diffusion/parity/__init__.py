"""Comparing this package with its references, layer by layer.

keras_cv.py    every layer of the six models with KerasCV's
"""

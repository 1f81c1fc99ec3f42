"""Solutions of lesson 11."""

import numpy as np


def merge_lora(kernel, a, b, alpha):
    return kernel + alpha / a.shape[1] * a @ b


def count_numbers(shapes, rank):
    return sum(rank * (rows + columns) for rows, columns in shapes)


def extract_lora(before, after, rank):
    u, s, vt = np.linalg.svd(after - before, full_matrices=False)
    return u[:, :rank] * s[:rank], vt[:rank]

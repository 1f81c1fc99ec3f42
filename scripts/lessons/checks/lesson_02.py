"""Checks of lesson 2."""

import numpy as np
from lesson import Wrong

RNG = np.random.default_rng(0)
TOKENS = np.array([3, 0, 3, 5])
TABLE, PLACES = RNG.normal(size=(9, 6)), RNG.normal(size=(7, 6))


def check_embed(answer):
    found = np.asarray(answer(TOKENS, TABLE, PLACES))
    if found.shape != (4, 6):
        raise Wrong(f"4 tokens and tables of width 6 gave {found.shape}, not (4, 6).")
    if np.allclose(found, TABLE[TOKENS]):
        raise Wrong("the places are missing: token 3 stands there twice and has the same vector.")
    if np.allclose(found, TABLE[TOKENS] + PLACES[TOKENS]):
        raise Wrong("the place of a token is where it stands, 0 to T - 1, not its id.")
    if np.allclose(found, TABLE[TOKENS] + PLACES[1:5]):
        raise Wrong("places are counted from 0.")
    if not np.allclose(found, TABLE[TOKENS] + PLACES[:4]):
        raise Wrong("add the vector of each token to that of its place.")


def check_make_causal_mask(answer):
    for size in (1, 5):
        found, right = np.asarray(answer(size)), np.tri(size, dtype=bool)
        if found.shape != (size, size):
            raise Wrong(f"it gave {found.shape} for T = {size}, not {(size, size)}.")
        if found.dtype != bool:
            raise Wrong(f"it gave {found.dtype}, not bool.")
        if size > 1 and (found == right.T).all():
            raise Wrong("rows look, columns are looked at: yours lets tokens look ahead only.")
        if (found == (right & ~np.eye(size, dtype=bool))).all():
            raise Wrong("a token may look at itself, too.")
        if not (found == right).all():
            raise Wrong(f"for T = {size} it should be\n{right.astype(int)}")


def check_find_changed(answer):
    a = RNG.normal(size=(6, 8))
    b = a.copy()
    b[2, 3] += 1
    b[4] -= 0.001
    b[5] += 1e-7
    found = answer(a, b)
    if not isinstance(found, list | tuple):
        raise Wrong(f"it should return a list of ints, not {type(found).__name__}.")
    found = list(map(int, found))
    if found == [2, 4, 5]:
        raise Wrong("place 5 differs by 1e-7 only: that is rounding.")
    if found == [4]:
        raise Wrong("place 2 differs in one number of its vector: any number counts.")
    if found == [3]:
        raise Wrong("these are numbers inside a vector, not places: places are the rows.")
    if found != [2, 4]:
        raise Wrong(f"places 2 and 4 differ, and it gave {found}.")
    if list(answer(a, a)):
        raise Wrong("two equal contexts differ nowhere.")


WRONG = {
    "embed": [
        (lambda tokens, table, places: table[tokens], "places are missing"),
        (lambda tokens, table, places: table[tokens] + places[tokens], "not its id"),
        (lambda tokens, table, places: table + places[0], "not (4, 6)"),
    ],
    "make_causal_mask": [
        (lambda T: np.tri(T, dtype=bool).T, "look ahead only"),
        (lambda T: np.tri(T, k=-1, dtype=bool), "look at itself"),
        (lambda T: np.tri(T), "not bool"),
    ],
    "find_changed": [
        (lambda a, b: list(np.where((a != b).any(1))[0]), "rounding"),
        (lambda a, b: list(np.where((abs(a - b) > 1e-5).all(1))[0]), "any number counts"),
        (lambda a, b: np.where((abs(a - b) > 1e-5).any(1))[0], "not ndarray"),
    ],
}

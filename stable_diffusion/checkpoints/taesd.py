"""The original files of TAESD, the tiny VAE: one of the decoder and one of the encoder.

A file has the tensors of a `torch.nn.Sequential`, so that their names are numbers:

    taesd_encoder.safetensors    0.weight, 1.conv.0.weight, ..., 14.weight
    taesd_decoder.safetensors    1.weight, 3.conv.0.weight, ..., 19.weight

The shapes tell which half a file is, and the numbers how many blocks each stage has. Some programs
write both halves into one file; diffusers does so as well.

Reference: Ollin Boer Bohan 2023, https://github.com/madebyollin/taesd, `taesd.py`.
"""

import re
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path, PurePosixPath

from stable_diffusion.checkpoints.contents import SAFETENSORS, TORCH, describe_content, quote
from stable_diffusion.checkpoints.names import name_tiny_vae
from stable_diffusion.checkpoints.reader import Reader, make_missing_error
from stable_diffusion.checkpoints.tensors import SUFFIXES, load_tensors, open_tensors
from stable_diffusion.config import SD1, TinyVAEConfig

HALVES = {"decoder": "decoder", "image_encoder": "encoder"}  # component: the word in names
ROOTS = ("", "taesd_{}.", "{}.layers.")  # before the numbers: TAESD's own, ComfyUI's, diffusers'
PIXELS = 3  # channels of an image
MOST_BYTES = 2**26  # of a file: TAESD has 10 MB in float32
UNNAMED = r"(?!)"  # of a file with only one half: no other names


class TinyFiles(Reader):
    """Reads a tiny VAE from its original files. It needs only the halves that are used.

    Args:
        path: path of a file of one half, beside which the other half is found; of a file of both;
            or of a folder with one file of each half.

    Attributes:
        config: a `Config` whose `vae` is a `TinyVAEConfig`. All else is of Stable Diffusion 1.

    Raises:
        ValueError: a file cannot be read or has other layers, or the folder has several of a half.
    """

    loads = True

    @staticmethod
    def recognize(path):
        """Returns whether a path is a file of a tiny VAE, or a folder with one. Reads names only.

        Raises:
            ValueError: a file has layers that no tiny VAE has.
        """
        for file in _list_files(Path(path)):
            source = None
            with suppress(ValueError):  # other files are told of by those who load them
                source = _open_tensors(file)
            if source and _find_halves(source):
                return True
        return False

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.found = {}  # what `_find_halves` returns
        single = not self.path.is_dir()
        self.problem = f"There is no file of it {'beside' if single else 'in'} {self.path}."
        self._add_files(_list_files(self.path))
        if single and len(self.found) == 1:
            self._add_partner()
        if not self.found:
            raise ValueError(f"{self.path} is no tiny VAE (TAESD), nor a folder with its files.")
        halves = {component: config for component, (*_, config) in self.found.items()}
        vae = halves.get("decoder") or halves["image_encoder"]
        if len(halves) == 2:
            other = halves["image_encoder"]
            if (vae.width, vae.latent_channels) != (other.width, other.latent_channels):
                raise ValueError(
                    f"{self.path} has a decoder and an encoder that don't fit: their widths are "
                    f"{vae.width} and {other.width}, their latents have {vae.latent_channels} and "
                    f"{other.latent_channels} channels."
                )
            vae = replace(vae, encoder_blocks=other.encoder_blocks)
        super().__init__(replace(SD1, vae=vae))

    def _add_files(self, files):
        """Adds the halves in files. A file that is damaged matters only if its half is needed."""
        for file in files:
            try:
                halves = _find_halves(_open_tensors(file))
            except ValueError as error:
                self.problem = str(error)
                continue
            if twice := self.found.keys() & halves.keys():
                component = min(twice)
                raise ValueError(
                    f"{self.path} has several files of a tiny {component}, such as "
                    f"{quote(self.found[component][0].path.name)} and {quote(file.name)}. Pass the "
                    f"path of one."
                )
            self.found |= halves

    def _add_partner(self):
        """Adds the other half from the folder: by its name, otherwise the only one there is."""
        files = [file for file in _list_files(self.path.parent) if file.name != self.path.name]
        partner = choose_partner(self.path.name, [file.name for file in files])
        if partner:
            self._add_files([self.path.with_name(partner)])
            return
        found = []
        for file in files:
            with suppress(ValueError):
                found.append(_find_halves(_open_tensors(file)))
        others = [
            halves for halves in found if len(halves) == 1 and halves.keys() != self.found.keys()
        ]
        if len(others) == 1:
            self.found |= others[0]

    def check(self, component):
        """See `Reader.check`."""
        if component not in self.found:
            reason = f"The {component} of the tiny VAE can't be loaded. {self.problem}"
            raise make_missing_error(component, reason)

    def load(self, component, model):
        """Loads the parameters of a component: all of them, or none and a ValueError."""
        self.check(component)
        source, root, first, _ = self.found[component]
        other = next(half for name, half in HALVES.items() if name != component)
        ignored = rf"{re.escape(root.format(other))}.*|vae_(scale|shift)" if root else UNNAMED
        layout = name_tiny_vae(component, self.config.vae, root, first, ignored)
        load_tensors(component, layout.find_slots(model), source, layout)


def choose_partner(name, names):
    """Returns the name of the file of the other half, or None if no name tells.

    Args:
        name: name or path of a file, such as "taesd_decoder.pth".
        names: names of all files. That with the same suffix is preferred.
    """
    path = PurePosixPath(name)
    swap = {"encoder": "decoder", "decoder": "encoder"}
    stem = re.sub("encoder|decoder", lambda match: swap[match[0]], path.stem)
    files = [
        other
        for other in map(PurePosixPath, sorted(names))
        if (other.parent, other.stem) == (path.parent, stem) and other.suffix.lower() in SUFFIXES
    ]
    files.sort(key=lambda other: other.suffix != path.suffix)
    return str(files[0]) if files and stem != path.stem else None


def _list_files(path):
    """Returns those files at a path, that of a file or a folder, that may be a tiny VAE's."""
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES]
    else:
        files = [path]
    return [file for file in files if file.is_file() and file.stat().st_size <= MOST_BYTES]


def _open_tensors(file):
    """Opens a file of tensors; None if it is something else."""
    return open_tensors(file) if describe_content(file) in (SAFETENSORS, TORCH) else None


def _find_halves(source):
    """Finds the halves of a tiny VAE that a file has.

    Args:
        source: result of `_open_tensors`.

    Returns:
        Dict from the component to where it is: source of tensors, root of names, number of the
        first convolution, and the `TinyVAEConfig`.

    Raises:
        ValueError: the file has layers that no tiny VAE has.
    """
    found, shapes = {}, source.shapes if source else {}
    for root, component in product(ROOTS, HALVES):
        name = root.format(HALVES[component])
        pattern = re.compile(rf"{re.escape(name)}(\d{{1,4}})\.(conv\.0\.)?weight")
        matches = [match for each in shapes if (match := pattern.fullmatch(each))]
        blocks = [int(match[1]) for match in matches if match[2]]
        others = sorted(int(match[1]) for match in matches if not match[2])  # plain convolutions
        if not blocks or not others:
            continue
        start, end = (shapes[f"{name}{n}.weight"] for n in (others[0], others[-1]))
        decodes = component == "decoder"
        if len(start) != 4 or len(end) != 4 or decodes == (start[1] == PIXELS):
            continue
        counts = tuple(sum(a < n < b for n in blocks) for a, b in pairwise(others))
        ways = counts[:: -1 if decodes else 1], counts[:: 1 if decodes else -1]
        try:
            config = TinyVAEConfig(start[0], *ways, start[1] if decodes else end[0])
        except ValueError as error:
            raise ValueError(f"{source.path} is no tiny VAE that is supported: {error}") from error
        found[component] = source, root, others[0], config
    return found

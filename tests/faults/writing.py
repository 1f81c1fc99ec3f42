"""What children write: saves that are killed, that meet a full disk, or that run at once."""

import contextlib
import hashlib
import io
import os
import resource
import signal
import warnings
from pathlib import Path

import numpy as np
from children import count_touches
from keras import ops
from samples import load_component, make_pipeline, make_tokenizer, read_variable

from stable_diffusion.checkpoints import open_checkpoint
from stable_diffusion.checkpoints.formats import FORMATS
from stable_diffusion.checkpoints.openvino import OpenVINOFolder
from stable_diffusion.command import convert


def make_changed(seed):
    """Returns the pipeline with other parameters for each seed."""
    pipeline = make_pipeline()
    if seed != getattr(pipeline, "seed", 0):
        before = getattr(pipeline, "seed", 0)
        for component in ("text_encoder", "diffusion_model", "decoder", "image_encoder"):
            for variable in getattr(pipeline, component).weights:
                variable.assign(read_variable(variable) + np.float32(seed - before))
        pipeline.seed = seed
    return pipeline


def save(format, target, seed, kill_at=None):
    """Saves the pipeline; returns how many times it touched files.

    Args:
        format: a key of `FORMATS`; "convert" converts `target.source`; "cache" computes contexts.
        target: path.
        seed: see `make_changed`.
        kill_at: number of the touch before which the process is killed, or None.
    """
    target = Path(target)
    pipeline = make_changed(seed)
    pipeline._tokenizer = make_tokenizer(str(target.parent.parent))
    if format == "convert":
        source = target.with_name(f"source-{seed}")
        if not source.exists():
            pipeline.save(source, "diffusers", "float32")
    with count_touches(target.parent, kill_at) as touches, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if format == "convert":
            error = io.StringIO()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
                status = convert.main([str(source), str(target), "--dtype", "float32"])
            if status:
                assert status == 2, status
                raise ValueError(error.getvalue().strip())
        elif format == "cache":
            from stable_diffusion.training import Cache

            Cache(target, pipeline).encode_texts([f"a cat {n}" for n in range(9)])
        else:
            pipeline.save(target, format, None if format.startswith("keras") else "float32")
    return len(touches)


def fail_to_save(format, target, seed, size):
    """Saves where no file may be larger than `size` bytes; returns the error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return try_to_save(format, target, seed)


def try_to_save(format, target, seed):
    """Saves; returns the error, or None."""
    try:
        save(format, target, seed)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def identify(target):
    """Returns a hash of all parameters that a reader finds."""
    reader, digest = open_checkpoint(target), hashlib.sha256()
    for component in FORMATS["openvino"].components:
        if isinstance(reader, OpenVINOFolder):
            path = reader.build(component, None).path
            digest.update(path.read_bytes() + path.with_suffix(".bin").read_bytes())
            continue
        for variable in load_component(reader, component).weights:
            digest.update(np.ascontiguousarray(ops.convert_to_numpy(variable.value)).tobytes())
    digest.update(repr((reader.config, reader.tokenizer().vocab)).encode())
    return digest.hexdigest()


def find_state(target):
    """Returns `identify(target)`, or False if there is nothing that can be loaded."""
    try:
        return identify(target)
    except ValueError:
        return False


def check_cache(target):
    """Returns a hash of the contexts that a cache finds."""
    from stable_diffusion.training import Cache

    pipeline = make_pipeline()
    pipeline._tokenizer = make_tokenizer(str(Path(target).parent.parent))
    contexts = [Cache(target, pipeline).read_context(f"a cat {n}") for n in range(9)]
    return hashlib.sha256(np.stack(contexts).tobytes()).hexdigest()


def download(endpoint, cache, repository):
    """Downloads a file of a repository; returns its hash."""
    os.environ |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    from huggingface_hub import constants

    constants.ENDPOINT, constants.HF_HUB_CACHE = endpoint, cache
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HUGGINGFACE_CO_URL_TEMPLATE = template
    constants.DOWNLOAD_CHUNK_SIZE = 10_000
    from stable_diffusion.checkpoints import hub

    found, name = hub.find_repository(repository)
    return hashlib.sha256(found.fetch_file(name).read_bytes()).hexdigest()

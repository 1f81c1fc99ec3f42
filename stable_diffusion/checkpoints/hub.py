"""Downloads from the Hugging Face hub: the presets' files, and repositories.

The library `huggingface_hub` downloads: it has the cache, the progress bar, retries, and settings
such as `HF_HOME` and `HF_ENDPOINT`. A file that is in its cache is used without the network.

The presets' files were converted from those of Stability AI and CompVis. By using them you accept
their licences:
Stable Diffusion 1.4, CreativeML Open RAIL-M,
https://raw.githubusercontent.com/CompVis/stable-diffusion/main/LICENSE; Stable Diffusion 2.1,
CreativeML Open RAIL++-M,
https://raw.githubusercontent.com/Stability-AI/stablediffusion/main/LICENSE-MODEL.
"""

import hashlib
import re
from contextlib import suppress
from pathlib import Path

PUBLISHED = {  # name of the file: (repository on the hub, sha256)
    "kcv_encoder.h5": (
        "fchollet/stable-diffusion",
        "4789e63e07c0e54d6a34a29b45ce81ece27060c499a709d556c7755b42bb0dc4",
    ),
    "kcv_diffusion_model.h5": (
        "fchollet/stable-diffusion",
        "8799ff9763de13d7f30a683d653018e114ed24a6a819667da4f5ee10f9e805fe",
    ),
    "kcv_decoder.h5": (
        "fchollet/stable-diffusion",
        "ad350a65cc8bc4a80c8103367e039a3329b4231c2469a1093869a345f55b1962",
    ),
    "vae_encoder.h5": (
        "fchollet/stable-diffusion",
        "c60fb220a40d090e0f86a6ab4c312d113e115c87c40ff75d11ffcf380aab7ebb",
    ),
    "text_encoder_v2_1.h5": (
        "ianstenbit/keras-sd2.1",
        "985002e68704e1c5c3549de332218e99c5b9b745db7171d5f31fcd9a6089f25b",
    ),
    "diffusion_model_v2_1.h5": (
        "ianstenbit/keras-sd2.1",
        "c31730e91111f98fe0e2dbde4475d381b5287ebb9672b1821796146a25c5132d",
    ),
}
SCHEME = "hf://"
TIMEOUT = 10.0  # seconds, for the list of a repository's files
ADDRESS = re.compile(  # owner/name, @revision, /FILE
    r"hf://([\w.-]+/[\w.-]+)(?:@([^@]+?))?(?:/([^@]+\.(?i:safetensors|sft|ckpt|pt|pth|bin)))?"
)
BY_HAND = (
    "If you have the file already, put it under this name into a folder and pass weights=FOLDER, "
    "or pass its path to the model's load_weights."
)


def download_published(filename) -> str:
    """Returns the path of a published file, and downloads it if it is not in the cache.

    Args:
        filename: a key of `PUBLISHED`.

    Returns:
        The path in the cache of `huggingface_hub`. The sha256 of the file was checked. A small file
        beside it remembers the check with the file's size and time of change, because hashing
        gigabytes needs seconds.

    Raises:
        ValueError: the file is not a published one, it cannot be downloaded, or it has another
            sha256. In the last case it is removed from the cache.
        ImportError: `huggingface_hub` is not installed.
    """
    if filename not in PUBLISHED:
        raise ValueError(f"The published files are {', '.join(PUBLISHED)}, not {filename!r}.")
    repo, sha256 = PUBLISHED[filename]
    path = _fetch_file(repo, filename)
    _verify_file(Path(path), repo, sha256)
    return path


def find_repository(address):
    """Finds the repository of an address on the hub.

    Args:
        address: "hf://owner/name", optionally followed by @REVISION, /FILE.safetensors or both.

    Returns:
        The `Repository`, and the name of the file or None.

    Raises:
        ValueError: the address has another form, or there is no such repository.
    """
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(
            f"An address on the hub is hf://owner/name or hf://owner/name@revision, optionally "
            f"followed by /FILE.safetensors, not {address!r}."
        )
    repo, revision, file = match.groups()
    return Repository(repo, revision), file


class Repository:
    """A repository of the hub at one commit. Without a network it has the files in the cache.

    Args:
        name: "owner/name".
        revision: branch, tag or commit; None is the main branch.

    Attributes:
        files: names of its files.
        folder: path of the folder in the cache with its files; None before the first download.

    Raises:
        ValueError: there is no such repository or revision, or no network.
    """

    def __init__(self, name, revision=None):
        self.name, self.revision = name, revision
        hub, errors = _import_hub(name)
        try:
            info = hub.HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
            self.files = [file.rfilename for file in info.siblings]
            self.commit, self.folder = info.sha, None
        except Exception as error:
            try:
                folder = hub.snapshot_download(name, revision=revision, local_files_only=True)
            except Exception:
                raise _make_error(str(self), hub, error) from error
            self.folder = Path(folder)
            files = (path for path in self.folder.rglob("*") if path.is_file())
            self.files = [path.relative_to(self.folder).as_posix() for path in files]
            self.commit = self.folder.name

    def __str__(self):
        return f"{SCHEME}{self.name}" + (f"@{self.revision}" if self.revision else "")

    def fetch_file(self, name) -> Path:
        """Returns the path of a file in the cache, and downloads it if it is not there.

        Raises:
            ValueError: the repository has no such file, the file cannot be downloaded, or the
                repository has changed since this object was made.
        """
        if name not in self.files:
            some = ", ".join(sorted(self.files)[:10])
            raise ValueError(f"{self} has no {name}. It has {len(self.files)} files: {some} ...")
        path = Path(_fetch_file(self.name, name, self.revision, self.commit))
        folder = path.parents[len(Path(name).parts) - 1]
        if folder.name != self.commit:
            raise ValueError(f"{self} has changed while it was read. Load it again.")
        self.folder = folder
        return path


def _import_hub(wanted):
    """Returns the modules `huggingface_hub` and `huggingface_hub.errors`.

    Args:
        wanted: name of what is downloaded, for the error.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(
            f"Downloading {wanted} needs huggingface_hub, which isn't installed: "
            f'pip install "stable-diffusion[hub]". {BY_HAND}'
        ) from error
    return hub, errors


def _make_error(what, hub, error):
    return ValueError(
        f"{what} can't be downloaded from {hub.constants.ENDPOINT} "
        f"({type(error).__name__}: {error}). {BY_HAND}"
    )


def _fetch_file(repo, filename, revision=None, commit=None):
    """Returns the path of a file in the cache, and downloads it if it is not there.

    The cache is searched for the commit, but the download names the revision. So the cache
    remembers which commit the revision was, and finds it later without a network.
    """
    hub, errors = _import_hub(filename)
    path = hub.try_to_load_from_cache(repo, filename, revision=commit or revision)
    if isinstance(path, str):
        return path
    try:
        # Without a network hf_hub_download tries again for half a minute. This request fails at
        # once. If a server answers with an error, hf_hub_download decides whether to try again.
        with suppress(errors.HfHubHTTPError):
            hub.get_hf_file_metadata(hub.hf_hub_url(repo, filename, revision=revision))
        return hub.hf_hub_download(repo, filename, revision=revision)
    except Exception as error:  # also errors of the HTTP library, which differs by version
        raise _make_error(f"{filename} of {repo}", hub, error) from error


def _verify_file(path, repo, sha256):
    """Raises a ValueError, and removes a file from the cache, unless it has this sha256."""
    blob = path.resolve()  # the path in the cache is a link
    checked, stat = blob.with_name(f"{blob.name}.sha256-ok"), blob.stat()
    record = f"{sha256} {stat.st_size} {stat.st_mtime_ns}"
    if checked.is_file() and checked.read_text() == record:
        return
    received = hashlib.sha256()
    with blob.open("rb") as file:
        while chunk := file.read(1 << 20):
            received.update(chunk)
    if received.hexdigest() == sha256:
        with suppress(OSError):  # if the cache is read-only, the file is hashed each time
            checked.write_text(record)
        return
    for file in (path, blob, checked):
        file.unlink(missing_ok=True)
    raise ValueError(
        f"{path.name} from {repo} is not the published file and was removed from the cache: its "
        f"sha256 is {received.hexdigest()}, not {sha256}. Download it again. {BY_HAND}"
    )

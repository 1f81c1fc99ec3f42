"""Downloads, from a server on the loopback that speaks what `hf_hub_download` asks of the hub."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from helpers import check_equal, layers_of, write_legacy
from safetensors.numpy import save

from stable_diffusion import Decoder, StableDiffusion
from stable_diffusion.checkpoints import hub, open_checkpoint
from stable_diffusion.checkpoints.hub import PUBLISHED, download_published
from stable_diffusion.checkpoints.kerascv import PRESETS, V1_FILES, Preset
from stable_diffusion.checkpoints.names import name_tiny_vae
from stable_diffusion.checkpoints.tensors import collect_tensors
from stable_diffusion.command import generate
from stable_diffusion.config import TINY, TinyVAEConfig, VAEConfig
from stable_diffusion.tiny_vae import TinyDecoder, TinyEncoder

pytest.importorskip("huggingface_hub")
from huggingface_hub import constants, utils  # noqa: E402

pytestmark = pytest.mark.usefixtures("reused")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = bytes(range(256)) * 4000  # 1 MB
FILE = "kcv_decoder.h5"


class Hub(ThreadingHTTPServer):
    """Serves `files`, a dict of paths; records requests; cuts the first `cuts` answers short."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.cuts = {}, [], 0

    def gets(self, file=FILE):
        return [
            headers for method, path, headers in self.requests if (method, file) == ("GET", path)
        ]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    do_GET = do_HEAD

    def answer(self):
        if self.path.startswith("/api/models/"):
            return self.list_files()
        repo, _, file = self.path.strip("/").partition("/resolve/")
        _, _, file = file.partition("/")  # the revision
        self.server.requests.append((self.command, file, self.headers))
        content = self.server.files.get((repo, file))
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - start))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            end = len(content)
            if self.server.cuts:
                self.server.cuts -= 1
                end, self.close_connection = end // 2, True
            self.wfile.write(content[start:end])

    def list_files(self):
        """What `HfApi.model_info` asks for: of a revision, "v2", or of the main branch."""
        repo, _, revision = self.path.removeprefix("/api/models/").partition("/revision/")
        names = [name for owner, name in self.server.files if owner == repo]
        known = names and revision in ("", "v2")
        answer = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        answer = json.dumps(answer if known else {"error": "not found"}).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(answer)))
        if not known:
            self.send_header("X-Error-Code", "RevisionNotFound" if names else "RepoNotFound")
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


@contextmanager
def point_hub_at(endpoint, cache, monkeypatch):
    """Does what HF_ENDPOINT and HF_HOME do, which `huggingface_hub` reads when it is imported."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


@pytest.fixture
def server(tmp_path, monkeypatch):
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            endpoint = f"http://127.0.0.1:{server.server_port}"
            with point_hub_at(endpoint, tmp_path / "cache", monkeypatch):
                yield server
        finally:
            server.shutdown()
            thread.join()


def publish(server, monkeypatch, content=CONTENT, file=FILE):
    repo, _ = PUBLISHED[file]
    monkeypatch.setitem(PUBLISHED, file, (repo, hashlib.sha256(content).hexdigest()))
    server.files[repo, file] = content


def test_second_time_comes_from_the_cache(server, monkeypatch):
    publish(server, monkeypatch)
    path = download_published(FILE)
    assert Path(path).name == FILE and Path(path).read_bytes() == CONTENT
    requests = len(server.requests)
    assert len(server.gets()) == 1
    assert download_published(FILE) == path
    assert len(server.requests) == requests  # nothing was asked, not even whether it changed


def test_a_file_is_hashed_once(server, monkeypatch):
    publish(server, monkeypatch)
    path = Path(download_published(FILE))
    monkeypatch.setattr(hub.hashlib, "sha256", lambda: pytest.fail("hashed again"))
    download_published(FILE)
    os.utime(path, ns=(1, 1))
    with pytest.raises(pytest.fail.Exception, match="hashed again"):
        download_published(FILE)


def test_read_only_cache(server, monkeypatch):
    publish(server, monkeypatch)
    (checked,) = Path(download_published(FILE)).resolve().parent.glob("*.sha256-ok")
    checked.unlink()

    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert Path(download_published(FILE)).read_bytes() == CONTENT


def test_interrupted_download_goes_on_where_it_stopped(server, monkeypatch):
    publish(server, monkeypatch)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # it is 10 MB
    server.cuts = 1
    assert Path(download_published(FILE)).read_bytes() == CONTENT
    first, second = server.gets()
    assert "Range" not in first and second["Range"] == f"bytes={len(CONTENT) // 2}-"


@pytest.mark.parametrize("damaged", ["on the hub", "in the cache"])
def test_wrong_content(damaged, server, monkeypatch):
    publish(server, monkeypatch)
    repo, expected = PUBLISHED[FILE]
    other = b"x" * len(CONTENT)
    if damaged == "on the hub":
        server.files[repo, FILE] = other
    else:
        Path(download_published(FILE)).write_bytes(other)
    with pytest.raises(ValueError, match="was removed from the cache") as error:
        download_published(FILE)
    for part in (FILE, repo, expected, hashlib.sha256(other).hexdigest(), "weights=FOLDER"):
        assert part in str(error.value)
    cache = Path(constants.HF_HUB_CACHE)
    assert not [path for path in cache.rglob("*") if path.name.startswith(FILE)]
    assert not [path for path in cache.rglob("blobs/*")]
    server.files[repo, FILE] = CONTENT
    assert Path(download_published(FILE)).read_bytes() == CONTENT


def test_no_such_file_on_the_hub(server):
    with pytest.raises(ValueError, match="404") as error:
        download_published(FILE)
    for part in (FILE, PUBLISHED[FILE][0], constants.ENDPOINT, "weights=FOLDER"):
        assert part in str(error.value)


def test_no_network(tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        start = time.monotonic()
        with point_hub_at(endpoint, tmp_path, monkeypatch):
            with pytest.raises(ValueError, match="can't be downloaded") as error:
                download_published(FILE)
        assert time.monotonic() - start < 5
    for part in (FILE, PUBLISHED[FILE][0], endpoint, "weights=FOLDER"):
        assert part in str(error.value)


def test_not_a_published_file():
    with pytest.raises(ValueError, match="published files are kcv_encoder.h5, .* not 'x.h5'"):
        download_published("x.h5")


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "stable-diffusion\[hub\]"'):
        download_published(FILE)


def test_hub_settings_in_the_environment(server, monkeypatch, tmp_path):
    """In a fresh process, from this one module, so that Keras needn't be imported again."""
    publish(server, monkeypatch)
    code = (
        "import runpy, sys; module = runpy.run_path(sys.argv[1]);"
        "module['PUBLISHED'][sys.argv[2]] = tuple(sys.argv[3:]);"
        "print(module['download_published'](sys.argv[2]))"
    )
    environment = os.environ | {
        "HF_ENDPOINT": constants.ENDPOINT,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", code, hub.__file__, FILE, *PUBLISHED[FILE]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    assert path.is_relative_to(tmp_path / "home" / "hub") and path.read_bytes() == CONTENT
    assert done.stderr == ""


def test_pipeline_downloads_each_part_when_it_is_built(server, monkeypatch, tmp_path):
    layers = layers_of(Decoder(64, 64, config=TINY.vae, download_weights=False))
    content = write_legacy(tmp_path / FILE, layers).read_bytes()
    publish(server, monkeypatch, content)
    monkeypatch.setitem(PRESETS, "sd1.4", Preset(TINY, V1_FILES))
    pipeline = StableDiffusion(jit_compile=False)
    assert pipeline.config == TINY and server.requests == []
    weights = pipeline.decoder.get_weights()
    expected = [value for _, tensors in layers for _, value in tensors]
    for value, other in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(value, other)
    assert {file for _, file, _ in server.requests} == {FILE} and len(server.gets()) == 1
    with pytest.raises(ValueError, match="kcv_encoder.h5 of .* can't be downloaded"):
        _ = pipeline.text_encoder


# Repositories


REPO = "owner/tiny"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pipeline, and the folder in diffusers' layout that it wrote."""
    pipeline = StableDiffusion(weights=None, config=TINY, jit_compile=False)
    folder = tmp_path_factory.mktemp("made") / "tiny"
    pipeline.save(folder, dtype="float32")
    return pipeline, folder


@pytest.fixture
def repository(server, made):
    """Publishes the folder as a repository, with files that nobody needs; returns its pipeline."""
    pipeline, folder = made
    for path in folder.rglob("*"):
        if path.is_file():
            server.files[REPO, path.relative_to(folder).as_posix()] = path.read_bytes()
    for name in ("README.md", "unet/diffusion_pytorch_model.bin", "safety_checker/config.json"):
        server.files[REPO, name] = b"not needed"
    return pipeline


def asked(server):
    """Names of the files that were downloaded since the last time."""
    names = {file for method, file, _ in server.requests if method == "GET" and file}
    server.requests.clear()
    return names


@pytest.mark.parametrize("address", [f"hf://{REPO}", f"hf://{REPO}@v2"])
def test_only_what_is_needed_is_downloaded(address, server, repository):
    model = StableDiffusion(weights=address, jit_compile=False)
    assert all(name.endswith((".json", ".txt")) for name in asked(server))
    expected = repository.decoder.get_weights()
    for ours, theirs in zip(model.decoder.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert asked(server) == {"vae/diffusion_pytorch_model.safetensors"}
    _ = model.image_encoder  # in the same file
    assert asked(server) == set()
    _ = model.diffusion_model
    assert asked(server) == {"unet/diffusion_pytorch_model.safetensors"}
    assert model.tokenizer.vocab == repository.tokenizer.vocab


def test_without_network_from_the_cache(server, repository):
    _ = StableDiffusion(weights=f"hf://{REPO}", jit_compile=False).decoder
    server.files.clear()  # as if it were gone
    model = StableDiffusion(weights=f"hf://{REPO}", jit_compile=False)
    assert len(model.decoder.get_weights()) == len(repository.decoder.weights)
    with pytest.raises(ValueError, match="no diffusion_pytorch_model.safetensors"):
        _ = model.diffusion_model


def test_one_file_of_a_repository(server, repository, tmp_path):
    repository.save(tmp_path / "x.safetensors", "original", "float32")
    server.files[REPO, "x.safetensors"] = (tmp_path / "x.safetensors").read_bytes()
    model = StableDiffusion(weights=f"hf://{REPO}/x.safetensors", jit_compile=False)
    assert asked(server) == {"x.safetensors"}
    assert model.config.unet == TINY.unet
    with pytest.raises(ValueError, match=r"hf://owner/tiny has no y.safetensors. It has \d+ files"):
        StableDiffusion(weights=f"hf://{REPO}/y.safetensors")


def test_bin_and_variants(server, repository):
    """Only the chosen file of each component is downloaded."""
    stem = "unet/diffusion_pytorch_model"
    server.files[REPO, f"{stem}.bin"] = server.files.pop((REPO, f"{stem}.safetensors"))
    vae = server.files[REPO, "vae/diffusion_pytorch_model.safetensors"]
    server.files[REPO, "vae/diffusion_pytorch_model.ema.safetensors"] = vae
    model = StableDiffusion(weights=f"hf://{REPO}", variant="ema", jit_compile=False)
    asked(server)
    _ = model.decoder
    assert asked(server) == {"vae/diffusion_pytorch_model.ema.safetensors"}
    expected = repository.diffusion_model.get_weights()
    for ours, theirs in zip(model.diffusion_model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert asked(server) == {"unet/diffusion_pytorch_model.bin"}
    with pytest.raises(ValueError, match=r"folder has \(ema\), not 'fp16'"):
        StableDiffusion(weights=f"hf://{REPO}", variant="fp16")
    with pytest.raises(ValueError, match="ema must be False, except for a file"):
        open_checkpoint(f"hf://{REPO}", ema=True)


def test_repository_of_one_file(server, made, tmp_path):
    made[0].save(tmp_path / "x.safetensors", "original", "float32")
    server.files[REPO, "x.CKPT"] = (tmp_path / "x.safetensors").read_bytes()
    server.files[REPO, "README.md"] = b"words"
    assert open_checkpoint(f"hf://{REPO}").config.unet == TINY.unet
    assert asked(server) == {"x.CKPT"}
    server.files[REPO, "b.safetensors"] = b"not needed"
    with pytest.raises(ValueError, match=f"it: hf://{REPO}/b.safetensors, hf://{REPO}/x.CKPT"):
        open_checkpoint(f"hf://{REPO}")
    assert open_checkpoint(f"hf://{REPO}/x.CKPT").config.unet == TINY.unet


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://owner", "An address on the hub is hf://owner/name"),
        ("hf://owner/tiny/../x", "An address on the hub is hf://owner/name"),
        ("hf://owner/other", "hf://owner/other can't be downloaded from"),
        (f"hf://{REPO}@v3", "hf://owner/tiny@v3 can't be downloaded from"),
    ],
)
def test_addresses_of_nothing(address, message, server, repository):
    with pytest.raises(ValueError, match=message):
        StableDiffusion(weights=address)


def test_repository_of_something_else(server):
    server.files[REPO, "README.md"] = b"words"
    with pytest.raises(ValueError, match="is not in diffusers' layout: it has none of"):
        StableDiffusion(weights=f"hf://{REPO}")


def test_a_repository_that_changes_meanwhile(server, repository):
    found, _ = hub.find_repository(f"hf://{REPO}")
    found.commit = "f" * 40  # as listed before a new one came
    with pytest.raises(ValueError, match="hf://owner/tiny has changed while it was read"):
        found.fetch_file("vae/config.json")


# Another VAE


VAE_REPO = "owner/vae"
# Its shapes alone tell the config, as of published files.
STAGES = replace(TINY, vae=VAEConfig((32, 64), 1, norm_epsilon=1e-6, scaling_factor=0.5))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A pipeline with a VAE of two stages, and a folder of all forms that a repository can have."""
    pipeline = StableDiffusion(weights=None, config=STAGES, jit_compile=False)
    folder = tmp_path_factory.mktemp("other")
    pipeline.save(folder / "whole", dtype="float32")
    pipeline.save(folder / "whole.safetensors", "original", "float32")
    return pipeline, folder


@pytest.fixture
def publish_vae(server, other):
    """Returns a function that publishes the other VAE in one form, and returns its address."""

    def publish(form):
        _, folder = other
        for path in (folder / "whole").rglob("*"):
            name = path.relative_to(folder / "whole").as_posix()
            if form == "only":  # a repository of a VAE has its files at the top
                name = name.removeprefix("vae/") if name.startswith("vae/") else None
            if path.is_file() and name:
                server.files[VAE_REPO, name] = path.read_bytes()
        server.files[VAE_REPO, "README.md"] = b"not needed"
        server.files[VAE_REPO, "diffusion_pytorch_model.bin"] = b"not needed"
        vae = (folder / "whole/vae/diffusion_pytorch_model.safetensors").read_bytes()
        whole = (folder / "whole.safetensors").read_bytes()
        for name, content in (("vae.safetensors", vae), ("files/v1.safetensors", whole)):
            server.files[VAE_REPO, name] = content
        return f"hf://{VAE_REPO}" + (form if form[0] in "@/" else "")

    return publish


VAES = {  # form: the files that are downloaded, except configs and a tokenizer; the scaling factor
    "whole": ({"vae/diffusion_pytorch_model.safetensors"}, 0.5),
    "only": ({"config.json", "diffusion_pytorch_model.safetensors"}, 0.5),
    "@v2": ({"vae/diffusion_pytorch_model.safetensors"}, 0.5),
    "/vae.safetensors": ({"vae.safetensors"}, TINY.vae.scaling_factor),
    "@v2/files/v1.safetensors": ({"files/v1.safetensors"}, 0.5),
}


@pytest.mark.parametrize("form", VAES)
def test_a_vae_of_the_hub(form, server, made, other, publish_vae):
    """Only it is downloaded, and the second time nothing."""
    address = publish_vae(form)
    for needed in (VAES[form][0], set()):
        model = StableDiffusion(weights=made[1], vae=address, jit_compile=False)
        for component in ("decoder", "image_encoder"):
            weights = getattr(other[0], component).get_weights()
            for ours, theirs in zip(getattr(model, component).get_weights(), weights, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        files = asked(server)
        if form in ("whole", "@v2"):
            files = {name for name in files if not name.endswith((".json", ".txt"))}
        assert files == needed
        assert model.config.vae == replace(STAGES.vae, scaling_factor=VAES[form][1])
        server.files.clear()  # from the cache, without the network


@pytest.mark.parametrize("form", ["only", "/vae.safetensors"])
def test_the_command_with_a_vae_of_the_hub(form, made, other, publish_vae, eagerly, tmp_path):
    address, out = publish_vae(form), tmp_path / "x.png"
    arguments = ["a cat", "--weights", str(made[1]), "--steps", "1", "--seed", "0"]
    assert generate.main([*arguments, "--vae", address, "--out", str(out)]) == 0
    vae = other[1] / "whole" / "vae"
    vae = vae / "diffusion_pytorch_model.safetensors" if form[0] == "/" else vae
    model = StableDiffusion(weights=made[1], vae=vae, jit_compile=False)
    expected = model.text_to_image("a cat", num_steps=1, seed=[0], verbose=0)[0]
    with PIL.Image.open(out) as image:
        np.testing.assert_array_equal(np.asarray(image), expected)
        assert image.text["vae"] == address


@pytest.mark.parametrize("form", ["diffusers", "original", "only the decoder"])
def test_a_tiny_vae_of_the_hub(form, server):
    """Of the two original files the other half is downloaded as well, if there is one."""
    config = TinyVAEConfig(4, (1, 2), (2, 1))
    models = {
        "decoder": TinyDecoder(64, 64, config=config),
        "image_encoder": TinyEncoder(config=config),
    }
    for model in models.values():
        model.set_weights([np.random.default_rng(0).normal(size=v.shape) for v in model.weights])
    layouts = {half: name_tiny_vae(half, config, "", int(half == "decoder")) for half in models}
    files = {"taesd_decoder.safetensors": "decoder", "taesd_encoder.safetensors": "image_encoder"}
    if form == "diffusers":
        layouts = {half: name_tiny_vae(half, config) for half in models}
        settings = {"_class_name": "AutoencoderTiny", "num_encoder_blocks": [1, 2]}
        settings |= {"num_decoder_blocks": [2, 1], "encoder_block_out_channels": [4, 4]}
        settings |= {"decoder_block_out_channels": [4, 4]}
        server.files[VAE_REPO, "config.json"] = json.dumps(settings).encode()
        files = {"diffusion_pytorch_model.safetensors": None}
    for name, half in files.items():
        if form != "only the decoder" or half == "decoder":
            slots = [
                s for h in models if half in (h, None) for s in layouts[h].find_slots(models[h])
            ]
            server.files[VAE_REPO, name] = save(collect_tensors(slots, "float32"))
    published = {name for repo, name in server.files if repo == VAE_REPO}
    server.files[VAE_REPO, "README.md"] = b"not needed"
    address = f"hf://{VAE_REPO}" + ("" if form == "diffusers" else "/taesd_decoder.safetensors")
    found = StableDiffusion(weights=None, config=TINY, vae=address, jit_compile=False)
    assert found.config.vae.width == 4 and asked(server) == published
    for half, model in models.items():
        if half == "image_encoder" and form == "only the decoder":
            with pytest.raises(ValueError, match="There is no file of it beside"):
                found.checkpoint.check(half)
            continue
        check_equal(getattr(found, half), model)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://owner/other", "hf://owner/other can't be downloaded from"),
        (f"hf://{VAE_REPO}/y.safetensors", f"hf://{VAE_REPO} has no y.safetensors"),
        ("hf://owner", "An address on the hub is hf://owner/name"),
        (f"hf://{REPO}", "hf://owner/tiny is not in diffusers' layout"),
    ],
)
def test_a_vae_that_the_hub_does_not_have(address, message, server, made, publish_vae, capsys):
    publish_vae("whole")
    server.files[REPO, "README.md"] = b"words"
    assert generate.main(["a cat", "--weights", str(made[1]), "--vae", address]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1] and sum("stable-diffusion: " in line for line in error) == 1

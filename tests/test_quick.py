"""One call of every module, with a result that is known: `pytest -m quick` leaves no module out.

The modules' own tests are elsewhere. A new module that defines a function or class needs a line
here; the others, which are tables or collect names, only have to be importable.
"""

import ast
import pickle
from functools import cache
from importlib import import_module
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import FEW, layers_of, relative_error, write_legacy
from keras import ops
from traces import make_trace

import stable_diffusion
from stable_diffusion import Decoder, StableDiffusion
from stable_diffusion.config import SD1, TINY, TinyVAEConfig
from stable_diffusion.noise_scheduler import NoiseLevel
from stable_diffusion.samplers.sampler import DDIM

pytestmark = pytest.mark.quick
SPREAD = np.array([-1.0, 1.0]).reshape(1, 1, 2, 1)
PACKAGE = Path(stable_diffusion.__file__).parent


def ones(*shape):
    return np.ones(shape, "float32")


@cache
def pipeline():
    return StableDiffusion(weights=None, jit_compile=False, config=FEW)


def refuses(call, *arguments, **options):
    """Tells whether a call raises a ValueError."""
    with pytest.raises(ValueError):
        call(*arguments, **options)
    return True


def shows_help(main):
    """Tells whether a command shows its help and ends well."""
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    return exit.value.code == 0


def saves_and_opens(format, folder):
    """Tells whether a decoder is read back from the format that it was written in."""
    module = import_module("stable_diffusion.checkpoints")
    module.save_checkpoint(pipeline(), folder / "x", format)
    reader = module.open_checkpoint(folder / "x", config=FEW)
    found = reader.build("decoder", lambda **options: Decoder(64, 64, **options))
    expected = pipeline().decoder.get_weights()
    return all(map(np.array_equal, found.get_weights(), expected))


def saves_an_embedding(module, folder):
    module.save_embedding(folder / "x.safetensors", "<x>", ones(2, 15))  # the width should be 16
    return refuses(module.load_embedding, pipeline(), folder / "x.safetensors")


def undoes_a_change(module, folder):
    changes, model = module.Changes(), keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    before = model.get_weights()[0]
    changes.keep_original(model, 0, before)
    model.weights[0].assign(2 * before + 1)
    return changes.restore_originals() == {model: 1} and np.array_equal(
        model.get_weights()[0], before
    )


def loads_legacy(module, folder):
    layers = layers_of(pipeline().decoder)
    model = Decoder(64, 64, download_weights=False, config=FEW.vae)
    module.load_legacy(model, write_legacy(folder / "x.h5", layers))
    expected = [value for _, tensors in layers for _, value in tensors]
    return all(map(np.array_equal, model.get_weights(), expected))


def writes_a_png(module, folder):
    module.write_png(folder / "x.png", np.zeros((2, 3, 3), "uint8"), {"prompt": "a cat"})
    return module.read_text(folder / "x.png") == {"prompt": "a cat"}


def one_step(sampler, alpha=1.0, next_noise=None):
    """Returns where a sampler arrives in one step if the model predicts an x0 of 3 and noise 1."""
    levels = [(9, 0.5), (None, alpha)]
    ((_, latent, _),) = sampler(lambda *_: (3 * ones(1), ones(1)), ones(1), levels, next_noise)
    return round(float(latent[0]), 5)


def adds_new_noise(module, folder):
    found = [one_step(sample, 0.75, lambda: -ones(1)) for sample in (module.ddpm, module.euler_a)]
    kept = 0.25 - 0.25 / 0.5 * (1 - 0.5 / 0.75)  # equation 16 of DDIM's paper
    return found == [round(3 * 0.75**0.5 + kept**0.5 - (0.25 - kept) ** 0.5, 5)] * 2


def starts_from_an_image(module, folder):
    """At the first level there are √alpha of the image and √(1 - alpha) of the noise."""
    seen = []
    row = module.start_from(DDIM, lambda: 3 * ones(1))

    def denoise(latent, *_):
        seen.append(latent)
        return latent, latent

    list(row.sample(denoise, ones(1), [NoiseLevel(9, 0.36), NoiseLevel(None, 1.0)], None))
    return seen == [pytest.approx(0.6 * 3 + 0.8)]


def reads_a_log(module, folder):
    (folder / "loss.csv").write_text("step,loss,learning_rate,images_per_second\n1,2.5,0.1,3\n")
    return module.read_log(folder / "loss.csv")[0]["loss"] == 2.5


def reads_a_folder(module, folder):
    (folder / "a.png").touch()
    (folder / "a.txt").write_text("a cat")
    return [example.path.name for example in module.read_folder(folder)] == ["a.png"]


def lists_globals(module, folder):
    (folder / "x.bin").write_bytes(4 * pickle.dumps(Path("x"), protocol=2))
    return {name.partition(".")[0] for name in module.list_globals(folder / "x.bin")} == {"pathlib"}


def saves_a_state(module, folder):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    module.save_state(folder / "x.safetensors", model, 3)
    return module.load_state(folder / "x.safetensors", model) == 3


def sees_attention(module, folder):
    seen = []
    with module.attention_probe(pipeline(), lambda p, place: seen.append((place, p.sum(-1)))):
        pipeline().generate_image(ones(77, 16), num_steps=1, verbose=0)
    return all(place.step == 0 and np.allclose(sums, 1) for place, sums in seen) and len(seen) == 8


def sees_passes(module, folder):
    seen = []
    with module.watch_passes(pipeline(), seen.append):
        pipeline().generate_image(ones(77, 16), num_steps=2, verbose=0)
    return [(run.step, run.prompt, run.output.shape) for run in seen] == [
        (step, slice(1, 2), (2, 8, 8, 4)) for step in (0, 1)
    ]


def takes_and_drops_a_lock(module, folder):
    with module.make_temporary(folder) as hidden:
        taken = module.take_lock(hidden) is None
    return taken and not any(folder.iterdir())


def replaces_a_file(module, folder):
    with module.replace_file(folder / "x") as written:
        written.write_text("new")
    return [(path.name, path.read_text()) for path in folder.iterdir()] == [("x", "new")]


def decodes_in_strips(module, folder):
    decoder, latent = pipeline().decoder, np.random.default_rng(0).normal(size=(1, 8, 8, 4))
    latent = latent.astype("float32")
    return (
        relative_error(module.decode_in_strips(decoder, latent, 1, 10_000), decoder(latent)) < 1e-5
    )


CALLS = {  # module: function of the module and of an empty folder; it is true
    "": lambda m, _: "StableDiffusion" in dir(m),
    "adapters.embedding": saves_an_embedding,
    "adapters.lora_kinds": lambda m, _: m.find_lora_kind({"up", "down"}) is m.LORA_KINDS["LoRA"],
    "adapters.lora_lists": lambda m, _: "" in m.read_lists(["0", "1"]),
    "adapters.lora": lambda m, _: len(m.name_kernels(pipeline().diffusion_model)) > 30,
    "added_tokens": lambda m, _: (
        m.AddedTokens(["b"]).split("aBc") == [("a", None), ("B", "b"), ("c", None)]
    ),
    "attention_block": lambda m, _: np.allclose(
        ops.convert_to_numpy(m.attend(ones(1, 2, 4), ones(1, 3, 4), ones(1, 3, 4), 2)), 1
    ),
    "block": lambda m, _: m.cut_model(pipeline().decoder, id) == id(pipeline().decoder),
    "checkpoints.building": lambda m, _: m.allocate_array((3, 5), "float16").ctypes.data % 64 == 0,
    "checkpoints.changes": undoes_a_change,
    "checkpoints.contents": lambda m, folder: refuses(m.check_file, folder),
    "checkpoints.diffusers": lambda m, folder: saves_and_opens("diffusers", folder),
    "checkpoints.diffusers_config": lambda m, _: (
        len(m.make_config_files(FEW, {}, pipeline().tokenizer)) > 1
    ),
    "checkpoints.formats": lambda m, _: m.open_checkpoint("emoji").config.size == 128,
    "checkpoints.hub": lambda m, _: refuses(m.find_repository, "hf://no-owner"),
    "checkpoints.kerascv": loads_legacy,
    "checkpoints.layout": lambda m, _: (
        m.Layout({"no_layer": "x"}).find_slots(keras.Sequential()) == []
    ),
    "checkpoints.names": lambda m, _: "resblocks" in m.ignore_layers(m.CLIP, 11).ignored,
    "checkpoints.openvino": lambda m, folder: refuses(m.OpenVINOFolder, folder),
    "checkpoints.original": lambda m, _: (
        len(m.find_slots("decoder", pipeline().decoder, FEW)) == len(pipeline().decoder.weights)
    ),
    "checkpoints.reader": lambda m, _: m.Reader(TINY).tokenizer().end_of_text == 49407,
    "checkpoints.taesd": lambda m, _: (
        m.choose_partner("a_encoder.pth", ["a_decoder.pt"]) is not None
    ),
    "checkpoints.tensors": lambda m, folder: refuses(m.open_tensors, folder / "x.safetensors"),
    "checkpoints.torch_files": lists_globals,
    "checks": lambda m, _: m.check_int("x", np.array(3), high=3) == 3,
    "cleaning": lambda m, _: m.clean_text("A &amp;lt; Caf\u00c3\u00a9") == "a < caf\u00e9",
    "clip_skip": lambda m, _: m.check_skip(SD1.text, 1) == 1,
    "clip_tokenizer": lambda m, _: m.SimpleTokenizer().encode("a") == [49406, 320, 49407],
    "command.animation": lambda m, _: (
        [path.name for path in m.name_animations("a.gif", 2)]
        == [
            "a-1.gif",
            "a-2.gif",
        ]
    ),
    "command.arguments": lambda m, _: m.make_number_type(int, 1, 9)("7") == 7,
    "command.convert": lambda m, _: shows_help(m.main),
    "command.explain": lambda m, _: shows_help(m.main),
    "command.finetune": lambda m, _: shows_help(m.main),
    "command.generate": lambda m, _: shows_help(m.main),
    "command.parameters": lambda m, _: (
        m.read_parameters("a\nSteps: 1, Seed: 2, CFG scale: 3")[0] == "a"
    ),
    "command.png": writes_a_png,
    "command.redo": lambda m, _: m.read_place({"batch": "2 of 4"}) == (1, 4),
    "command.prompts": lambda m, _: m.WEB_SYNTAX.search("a (cat:1.3)") is not None,
    "command.terminal": lambda m, _: m.run_command("x", lambda argv: m.FAILED) == m.FAILED,
    "command.walk": lambda m, _: m.plan_frames(2, 2) == [(0, 0), (0, 1)],
    "config": lambda m, _: m.undo_departures(SD1).unet.norm_epsilon == 1e-6,
    "components": lambda m, _: (
        m.Components.decoder.fget(pipeline()).output_shape == (None, 64, 64, 3)
    ),
    "decoder": lambda m, _: (
        m.Decoder(64, 48, download_weights=False, config=FEW.vae)(ones(1, 8, 6, 4)).shape
        == (1, 64, 48, 3)
    ),
    "diffusion_model": lambda m, _: m.GEGLU(6)(ones(1, 2, 3)).shape == (1, 2, 6),
    "explain.boxes": lambda m, _: m.find_source(m.find_source).startswith(
        "stable_diffusion/explain/boxes.py:"
    ),
    "explain.daam": lambda m, _: m.normalize_map(2 * ones(1, 1)) == 1,
    "explain.charts": lambda m, _: m.draw_boxes([]) == "",
    "explain.page": lambda m, _: "</html>" in m.make_page(make_trace(num_steps=1)),
    "explain.notebook": lambda m, _: "alt" in m._show("x", np.zeros((8, 8, 3), "uint8"), 8),
    "explain.passes": sees_passes,
    "explain.pictures": lambda m, _: m.arrange_tiles(ones(2, 2, 4)).shape == (5, 5),
    "explain.probe": sees_attention,
    "explain.sections": lambda m, _: m.quote("<b>") == "&lt;b&gt;",
    "explain.trace": lambda m, _: m.Token(49407, "", "end").word is None,
    "explain.words": lambda m, _: m.find_words(pipeline(), "a, b")[1].positions == (3,),
    "files": lambda m, folder: refuses(m.find_file, folder, "../x"),
    "guidance": lambda m, _: (
        (m.rescale_guidance(4 * SPREAD, SPREAD, 0.5) == 2.5 * SPREAD).all()
        and m.embed_guidance(1, 4, 2).tolist() == [[0, 0, 1, 1]] * 2
    ),
    "image_encoder": lambda m, _: (
        pipeline().image_encoder(ones(1, 16, 24, 3)).shape == (1, 2, 3, 4)
    ),
    "masks": lambda m, _: m.read_mask(np.array([[0.9, 0.1]])).tolist() == [[True, False]],
    "images": lambda m, _: (m.quantize_pixels(ones(1, 2, 2, 3)) == 255).all(),
    "locking": takes_and_drops_a_lock,
    "noise": lambda m, _: m.make_noise_source((2, 3, 4), 5, seed=0)().shape == (5, 2, 3, 4),
    "noise_scheduler": lambda m, _: len(m.NoiseScheduler().levels(7)) == 8,
    "padded_conv2d": lambda m, _: (
        m.PaddedConv2D(5, 3, padding=2)(ones(1, 4, 4, 2)).shape == (1, 6, 6, 5)
    ),
    "parity.keras_cv": lambda m, _: m.relative_error(2 * ones(3), ones(3)) == 1,
    "pretrained": lambda m, folder: refuses(pipeline().decoder.load_weights, folder / "no.h5"),
    "previews": lambda m, _: (
        m.fit_colours(lambda latent: 3 * latent, (2, 2, 3)).round(4).tolist()
        == [[3, 0, 0], [0, 3, 0], [0, 0, 3], [0, 0, 0]]
    ),
    "prompts": lambda m, _: m.read_weights("a (cat:1.5)") == [["a ", 1.0], ["cat", 1.5]],
    "replacing": replaces_a_file,
    "resnet_block": lambda m, _: m.ResnetBlock(8, groups=2)(ones(1, 4, 4, 6)).shape == (1, 4, 4, 8),
    "samplers": lambda m, _: m.find_sampler("ddim") is m.SAMPLERS["ddim"],
    "samplers.ancestral": adds_new_noise,
    "samplers.classical": lambda m, _: (
        (one_step(m.heun), one_step(m.pndm)) == (3, round(2**0.5 - 1, 5))  # PNDM takes the noise
    ),
    "samplers.consistency": lambda m, _: list(m.space_lcm(ones(1000), 2)) == [499, 999],
    "samplers.from_image": starts_from_an_image,
    "samplers.deep_cache": lambda m, _: refuses(m.DeepCache, keras.Sequential(), 2),
    "samplers.sampler": lambda m, _: m.DDIM.start(2, alpha=0.5) == 2,
    "samplers.multistep": lambda m, _: one_step(m.dpmpp_2m) == one_step(m.unipc) == 3,
    "spacing": lambda m, _: (
        list(m.Grid().find_timesteps(np.linspace(0.9, 0.1, 10), 2, "leading", 1)) == [6, 1]
    ),
    "stable_diffusion": lambda m, _: pipeline().tokenize("a")[:3] == [49406, 320, 49407],
    "strips": decodes_in_strips,
    "text_encoder": lambda m, _: pipeline().encode_text("a").shape == (1, 77, 16),
    "tiny_vae": lambda m, _: (
        m.TinyDecoder(16, 8, config=TinyVAEConfig(2, (1, 1), (1, 1)))(ones(1, 8, 4, 4)).shape
        == (1, 16, 8, 3)
    ),
    "training.cache": lambda m, _: (
        m.hash_parameters(pipeline().decoder) == m.hash_parameters(pipeline().decoder)
    ),
    "training.callbacks": reads_a_log,
    "training.captions": lambda m, _: m.normalize_name("e\u0301") == "\u00e9",
    "training.data": lambda m, _: m.compute_snr_weights(SD1.schedule, [0]) < 0.01,
    "training.distribution": lambda m, _: m.join_processes() == (0, 1),
    "training.folder": reads_a_folder,
    "training.methods": lambda m, _: refuses(m.LoRA, pipeline(), rank=0),
    "training.optimizers": lambda m, _: refuses(m.make_optimizer, "best", 1e-3, 1),
    "training.state": saves_a_state,
}


def list_modules():
    """Yields the name of each module below the package, and whether it defines anything."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        name = name.removesuffix("__init__").removesuffix(".")
        body = ast.parse(path.read_text("utf-8")).body
        yield name, any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in body)


def test_no_module_is_left_out():
    modules = dict(list_modules())
    assert {name for name, defines in modules.items() if defines} == set(CALLS)
    for name in modules.keys() - {"__main__"}:  # which runs the command
        import_module(f"stable_diffusion.{name}".rstrip("."))


@pytest.mark.parametrize("module", CALLS)
def test_one_call(module, tmp_path):
    assert CALLS[module](import_module(f"stable_diffusion.{module}".rstrip(".")), tmp_path)


@pytest.mark.parametrize("call", ["load_lora", "load_embedding", "save"])
@pytest.mark.parametrize("path", [5, None, ["a"]])
def test_paths_of_other_types_are_refused(call, path):
    with pytest.raises(ValueError, match="path must be a str or a path, not "):
        getattr(pipeline(), call)(path)

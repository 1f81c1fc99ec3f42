"""The command `stable-diffusion`: generates images from prompts and writes them as PNG files."""

import argparse
import json
import os
import re
import secrets
import sys
import unicodedata
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from stable_diffusion.command.animation import (
    animate_image,
    load_preview_decoder,
    name_animations,
)
from stable_diffusion.command.arguments import (
    AUTO,
    SEEDS,
    Parser,
    add_checkpoint_options,
    add_sampling_options,
    make_number_type,
    open_with_options,
    parse_text,
)
from stable_diffusion.command.parameters import KEY, make_parameters
from stable_diffusion.command.png import hash_file, is_generated, write_png
from stable_diffusion.command.prompts import count_chunks, find_loras, load_loras, show_hint
from stable_diffusion.command.redo import (
    check_backend,
    check_redo,
    make_info,
    read_place,
    read_redo,
)
from stable_diffusion.command.terminal import (
    print_message,
    run_command,
    show_progress,
    silence_tensorflow,
)
from stable_diffusion.command.walk import (
    check_walk,
    mix_linearly,
    mix_on_sphere,
    plan_frames,
    save_walk,
)
from stable_diffusion.locking import try_to
from stable_diffusion.replacing import check_output
from stable_diffusion.version import __version__

NAME = "stable-diffusion"
USAGE = f'{NAME} "PROMPT" ["PROMPT" ...] [options]\n       {NAME} --prompts FILE [options]'
DESCRIPTION = """\
Generates images from prompts with Stable Diffusion and writes them as PNG files. It prints the
paths of the images to standard output, one a line, and everything else to standard error.
"""
EPILOG = r"""Names. Without --out an image gets its name from its prompt and its seed, as in
a-red-apple-on-a-blue-background-0.png, and goes to the current folder. With --out FILE.png it gets
this name; several images get FILE-1.png, FILE-2.png and so on. With --out FOLDER/ the images have
the same names as without --out, and go to that folder. Missing folders are made. A file of the same
name is replaced: the same command with the same --seed writes the same files again.

Text in the PNG. Each image has its own seed: the first has --seed, each next one 1 more. Its PNG
says as text how it was generated, so that it can be generated again: prompt, negative, seed, steps,
guidance, sampler, dtype, size (width x height), weights and version; guidance rescale, eta, noise
source, spacing, syntax, lora folder, variant, vae, prediction type, clip skip, jit and batch if
they were given, and backend if it is not tensorflow. The text "parameters" says it as the web
interface of AUTOMATIC1111 does. --redo FILE.png generates the image again, bit for bit on the same
machine, as FILE-redo.png unless --out is given. Options that are given too replace those of the
PNG. --info FILE.png prints these texts, also of a PNG of the web interface, and the command that
comes nearest.

Files of prompts. A file for --prompts has one prompt a line. If the name of the file ends in
.jsonl, each line is a JSON object such as {"prompt": "a cat", "negative": "blurry", "seed": 3}, of
which only the prompt is needed. Each image goes to --out FOLDER. Its name begins with the number of
its line, as in 00001-a-cat-3.png. Seeds begin at 0 unless --seed is given. An image that the folder
already has, generated with the same options, is not generated again: if a command was interrupted,
give it again and it goes on where it stopped.

Images to start from. --image FILE gets noise, which the last steps remove again, towards the
prompt. --strength says how many: with 0.6 it is 30 of 50 steps. The fewer, the more of the image
stays. With --mask FILE only what is white in the mask is painted anew; all other pixels stay
exactly as they are. The mask has the image's aspect. The image is scaled to the size that is
generated, and cropped in the middle. With --crop PADDING only the painted part is generated, with
so many pixels around it, and the image keeps its size. A line of JSON for --prompts may have
"image", "strength" and "mask" of its own. The PNG also says image, strength, mask and crop, and a
hash of these files.

Prompts of web interfaces. With --syntax webui a prompt may have weights, as in (word:1.3), (word)
and [word], brackets as text, as in \(word\), BREAK, and any number of tokens. <lora:name:0.8>
applies name.safetensors (or .pt, .bin) of --lora-folder, or of a folder in it, to the images of
this prompt. AND and [a:b:0.5] are refused.

Walks. --walk "a" "b" --out walk.gif generates --frames images on the way from one prompt to the
next, --batch at a time: their contexts are mixed linearly, and their noise on a sphere, from that
of --seed to that of the next seed. --out is a .gif, a .webp, or a folder of PNGs.

Animations. --animate FILE.gif or FILE.webp also shows how the image came to be: a small image of
what the model expected after each step, and the image at the end. Several images get FILE-1.gif,
FILE-2.gif and so on. A file of the same name is replaced. A small image has a pixel for 8x8 of the
image's; with --preview-vae a tiny VAE makes all of them.

Weights. "emoji" is part of the package: a small model of 520 kinds of emoji on coloured
backgrounds. "sd1.4" and "sd2.1-base" are downloaded on first use, some gigabytes; their licence is
CreativeML Open RAIL-M. Anything else is a path: a folder in diffusers' layout, of KerasCV's .h5
files or of models for OpenVINO, or a .safetensors or .ckpt file in the original layout; or
hf://owner/name on the Hugging Face Hub.

examples:
  stable-diffusion "a red apple on a blue background"
  stable-diffusion "a red apple on a blue background" --seed 3 --batch 4
  stable-diffusion "a cat face on green" "a dog face on green" --out pets.png
  stable-diffusion "an astronaut riding a horse" --weights sd1.4 --negative blurry --jit
  stable-diffusion "an astronaut" --weights model.safetensors --sampler dpmpp-2m --steps 20
  stable-diffusion "a dog face on green" --image cat.png --strength 0.7
  stable-diffusion "a yellow banana" --image photo.jpg --mask white-is-painted.png --crop 32
  stable-diffusion --prompts prompts.txt --batch 8 --out images/
  stable-diffusion "a red apple on a blue background" --animate apple.gif
  stable-diffusion --walk "a red apple" "a green apple" --frames 24 --batch 4 --out walk.gif

exit status: 0 done, 1 failed, 2 arguments or files that cannot be used,
130 interrupted, 143 ended by SIGTERM
"""
LINE_KEYS = {  # of a line in JSON
    "prompt": str,
    "negative": str,
    "seed": int,
    "image": str,
    "strength": float,
    "mask": str,
}
LINE_DEFAULTS = ("negative", "image", "strength", "mask")  # what the command line may say for all
STRENGTHS = {False: 0.8, True: 1.0}  # without and with a mask, as in `StableDiffusion`
STEPS, FEW_STEPS = 50, 4  # defaults; the latter for latent consistency models
SLUG_LENGTH = 80  # characters of a prompt in a file's name
SLUG_BYTES = 200  # of these characters; file systems have names of at most 255 bytes


def get_parser():
    """Returns the parser of the command line."""
    parser = Parser(NAME, usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="*", type=parse_text, help="what to show, in quotes")
    add("--prompts", metavar="FILE", type=parse_text, help="read prompts from a file; see below")
    add("--negative", metavar="TEXT", default="", type=parse_text, help="what not to show")
    add(
        "--weights", metavar="W", default="emoji", type=parse_text, help="default: emoji; see below"
    )
    add_checkpoint_options(parser)
    add("--out", metavar="FILE", type=parse_text, help="a .png file, or a folder; see below")
    add("--seed", metavar="S", type=make_number_type(int, 0, SEEDS - 1), help="default: random")
    add(
        "--batch",
        metavar="N",
        default=1,
        type=make_number_type(int, 1, 1024),
        help="images of each prompt, generated together; with --prompts, how many prompts are "
        "generated together (default: 1)",
    )
    add_sampling_options(add)
    add("--image", metavar="FILE", type=parse_text, help="an image to start from; see below")
    add(
        "--strength",
        metavar="S",
        type=make_number_type(float, 0, 1),
        help="share of the steps that is taken from --image on, above 0: with 0.6 30 of 50 steps "
        "(default: 0.8, or 1 with --mask)",
    )
    add("--mask", metavar="FILE", type=parse_text, help="what of --image to paint, in white")
    add(
        "--crop",
        metavar="PADDING",
        type=make_number_type(int, 0, 65536),
        help="paint only the part of --image around the --mask, with so many pixels around it",
    )
    add(
        "--eta",
        metavar="E",
        type=make_number_type(float, 0, 1),
        help="how much of the noise is new in each step of ddim, 0 to 1 (default: 0)",
    )
    add(
        "--lora-folder",
        metavar="FOLDER",
        type=parse_text,
        help="where the LoRAs of --syntax webui are",
    )
    add(
        "--walk",
        metavar="PROMPT",
        nargs="+",
        type=parse_text,
        help="generate frames on the way from prompt to prompt; see below",
    )
    add(
        "--frames",
        metavar="N",
        type=make_number_type(int, 2, 10_000),
        help="of --walk (default: 24)",
    )
    add(
        "--animate",
        metavar="FILE",
        type=parse_text,
        help="also write a .gif or .webp that shows how the image came to be; see below",
    )
    add(
        "--preview-vae",
        metavar="FILE",
        type=parse_text,
        help="a tiny VAE (TAESD) that decodes what --animate shows (default: a linear map)",
    )
    add("--redo", metavar="FILE", type=parse_text, help="generate a PNG again; see below")
    add("--info", metavar="FILE", type=parse_text, help="show how a PNG was generated")
    add("--jit", action="store_true", help="compile first; pays off for many or large images")
    parser.set_defaults(place=None)
    return parser


@dataclass
class Job:
    """An image that is to be generated, the path of its file, and what it is generated from.

    Attributes:
        animation: path of the file that shows how it came to be, or None.
        text: the prompt, without LoRAs if these are read.
        loras: pairs of the path and the scale of each LoRA.
    """

    prompt: str
    negative: str
    seed: int
    path: Path
    image: str | None = None
    strength: float | None = None
    mask: str | None = None
    animation: Path | None = None
    text: str | None = None
    loras: tuple = ()

    def __post_init__(self):
        self.text = self.prompt

    def check(self, num_steps):
        """Checks what it is generated from, as far as that takes no time.

        Raises:
            ValueError: files or a strength that can't be used.
        """
        from stable_diffusion.checks import find_first_step
        from stable_diffusion.images import check_image

        if self.image is None:
            unused = "--mask" if self.mask else "--strength"
            if self.mask or self.strength is not None:
                raise ValueError(f"argument {unused}: it needs --image")
            return
        if self.strength is None:
            self.strength = STRENGTHS[self.mask is not None]
        find_first_step(num_steps, self.strength)
        for name, path in {"--image": self.image, "--mask": self.mask}.items():
            try:
                if path is not None:
                    check_image(path)
            except ValueError as error:
                raise ValueError(f"argument {name}: {error}") from error


def make_slug(prompt):
    """Returns a prompt's letters and digits, in lower case and joined by hyphens."""
    letters = unicodedata.normalize("NFKC", prompt).lower()
    slug = re.sub(r"[\W_]+", "-", letters)[:SLUG_LENGTH]
    return slug.encode()[:SLUG_BYTES].decode(errors="ignore").strip("-") or "image"


def list_jobs(args):
    """Returns the `Job`s of the prompts in the command line.

    Raises:
        ValueError: `--out` is a file, but not a PNG; or see `name_animations` and `Job.check`.
    """
    prompts = [prompt for prompt in args.prompt for _ in range(args.batch)]
    first = secrets.randbelow(SEEDS) if args.seed is None else args.seed
    seeds = [(first + n) % SEEDS for n in range(len(prompts))]
    out, file = args.out, Path(args.out or ".")
    if not out or out.endswith(("/", os.sep)) or file.is_dir():
        paths = [
            file / f"{make_slug(prompt)}-{seed}.png"
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    elif file.suffix.lower() != ".png":
        raise ValueError(f"argument --out: {out!r} is neither a .png file nor a folder")
    elif len(seeds) == 1:
        paths = [file]
    else:
        paths = [file.with_stem(f"{file.stem}-{n + 1}") for n in range(len(seeds))]
    animations = [None] * len(paths)
    if args.animate is not None:
        animations = name_animations(args.animate, len(paths))
    jobs = [
        Job(prompt, args.negative, seed, path, args.image, args.strength, args.mask, animation)
        for prompt, seed, path, animation in zip(prompts, seeds, paths, animations, strict=True)
    ]
    for job in jobs:
        job.check(args.steps or STEPS)
    return jobs


def read_jobs(args):
    """Returns the `Job`s of the prompts in a file, see `EPILOG`.

    Raises:
        ValueError: a file that cannot be read; the message names the line.
    """
    file, folder = Path(args.prompts), Path(args.out or ".")
    if (folder.suffix.lower() == ".png" and not folder.is_dir()) or folder.is_file():
        raise ValueError(f"argument --out: with --prompts it is a folder, not {args.out!r}")
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not in UTF-8"
        raise ValueError(f"argument --prompts: {file}: {reason}") from error
    jobs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = read_object(line) if file.suffix == ".jsonl" else {"prompt": line.strip()}
            seed = data.get("seed", ((args.seed or 0) + len(jobs)) % SEEDS)
            path = folder / f"{number:05}-{make_slug(data['prompt'])}-{seed}.png"
            given = {key: data.get(key, getattr(args, key)) for key in LINE_DEFAULTS}
            jobs.append(Job(data["prompt"], seed=seed, path=path, **given))
            jobs[-1].check(args.steps or STEPS)
        except (ValueError, RecursionError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"argument --prompts: {file}, line {number}: {error}") from error
    if not jobs:
        raise ValueError(f"argument --prompts: {file} has no prompts")
    return jobs


def read_object(line):
    """Returns a line of JSON as a dict with some of `LINE_KEYS`, always with the prompt.

    Raises:
        ValueError, RecursionError, argparse.ArgumentTypeError: it is something else.
    """
    data = json.loads(line)
    if not isinstance(data, dict) or "prompt" not in data:
        raise ValueError('it must be an object with a "prompt"')
    for key, value in data.items():
        if type(value) is not LINE_KEYS.get(key) and not (key == "strength" and value == 1):
            raise ValueError(f"it can't have {key!a:.200}: {value!a:.200}")
        if isinstance(value, str):
            parse_text(value)
    if not 0 <= data.get("seed", 0) < SEEDS:
        raise ValueError(f"the seed must be from 0 to {SEEDS - 1}, not {data['seed']!r:.200}")
    return data


def split_words(text):
    """Splits a text into its words, in lower case: "T-Rex, woman's hat" has four.

    An emoji is a word too; punctuation is not.
    """
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    runs = re.findall(r"[^\W_]+(?:'[^\W_]+)*|.", text)
    return [run for run in runs if run[0].isalnum() or unicodedata.category(run[0]) == "So"]


def find_unseen_words(checkpoint, texts):
    """Returns the words of texts that a checkpoint was not trained on, each once, in their order.

    A checkpoint lists the words that it was trained on in a file words.txt beside its
    model_index.json, one word a line. Without this file no word counts as unseen.
    """
    folder = getattr(checkpoint, "folder", None)
    if folder is None or not (folder / "words.txt").is_file():
        return []
    seen = (folder / "words.txt").read_text("utf-8").split()
    words = dict.fromkeys(word for text in texts for word in split_words(text))
    return [word for word in words if word not in seen]


def describe_job(args, job, model):
    """Returns the text for an image's PNG: dict of str to str."""
    import keras

    backend = keras.backend.backend()
    guidance = model.config.guidance_scale if args.guidance is None else args.guidance
    text = {
        "prompt": job.prompt,
        "negative": job.negative,
        "seed": job.seed,
        "noise source": args.noise_source if args.noise_source != "keras" else None,
        "steps": args.steps,
        "guidance": float(guidance),
        "guidance rescale": args.guidance_rescale or None,
        "sampler": args.sampler,
        "eta": args.eta,
        "spacing": args.spacing,
        "syntax": args.syntax,
        "lora folder": args.lora_folder if job.loras else None,
        "dtype": keras.config.dtype_policy().name,
        "size": f"{model.img_width}x{model.img_height}",
        "weights": args.weights,
        "variant": args.variant,
        "vae": args.vae,
        "prediction type": args.prediction_type,
        "clip skip": args.clip_skip or None,
        "jit": args.jit or None,
        "backend": backend if backend != "tensorflow" else None,
        "image": job.image,
        "image sha256": job.image and hash_file(job.image),
        "strength": job.strength and float(job.strength),
        "mask": job.mask,
        "mask sha256": job.mask and hash_file(job.mask),
        "crop": args.crop,
        "version": __version__,
    }
    return {key: str(value) for key, value in text.items() if value is not None}


def generate_images(args):
    """Generates the images that the arguments ask for, and writes them."""
    if args.info:
        print(make_info(args.info))
        return
    if args.animate is not None and (args.walk or args.prompts or args.crop is not None):
        raise ValueError("argument --animate: not allowed with --walk, --prompts or --crop")
    if args.preview_vae is not None and args.animate is None:
        raise ValueError("argument --preview-vae: it needs --animate")
    if args.walk:
        write_walk(args)
        return
    if args.frames:
        raise ValueError("argument --frames: it needs --walk")
    if bool(args.prompt) == bool(args.prompts):
        raise ValueError("it needs either a PROMPT or --prompts FILE (see --help)")
    jobs = read_jobs(args) if args.prompts else list_jobs(args)
    paths = jobs[0].path, jobs[0].animation or jobs[0].path
    with make_folder(paths[0].parent), make_folder(paths[1].parent):
        write_images(args, jobs)


@contextmanager
def make_folder(folder):
    """Makes a folder, and those above it. After an error it removes those that are still empty.

    Raises:
        ValueError: the system does not allow it.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"argument --out: no folder {folder}: {error.strerror}") from error
        yield
    except BaseException:  # also Ctrl-C
        for path in missing:
            try_to(os.rmdir, path)
        raise


def open_model(args):
    """Returns the pipeline, and the options of the sampler's own; sets the sampler of "auto"."""
    show_progress(f"loading {args.weights} ...")
    with silence_tensorflow():
        import keras

        from stable_diffusion.samplers import (
            bind_options,
            find_sampler,
            is_for_few_steps,
            name_sampler,
        )
        from stable_diffusion.stable_diffusion import StableDiffusion
    if args.dtype:
        keras.config.set_dtype_policy(args.dtype)
    if args.redo:
        check_backend(NAME, args.recorded)
    checkpoint = open_with_options(args, args.weights)
    model = StableDiffusion(args.height, args.width, args.jit, checkpoint)
    if args.sampler == AUTO:
        sampler, spacing = name_sampler(model.config.sampler)
        # A model that sees the guidance scale was distilled to few steps.
        args.sampler = "lcm" if model.config.unet.guidance_width else sampler
        args.spacing = args.spacing or (spacing if args.sampler == sampler else None)
    args.steps = args.steps or (FEW_STEPS if is_for_few_steps(model.config) else STEPS)
    own = {} if args.eta is None else {"eta": args.eta}
    sampler = bind_options(find_sampler(args.sampler), own)
    model.config.schedule.levels(args.steps, args.spacing, sampler)  # raises an error, if any, now
    return model, own


def write_walk(args):
    """Generates the frames of `--walk`, and writes them.

    Raises:
        ValueError: arguments that exclude each other, or can't be used.
    """
    if args.prompt or args.prompts or args.image or args.mask or args.redo:
        raise ValueError("argument --walk: no other prompts, --image, --mask or --redo are allowed")
    if len(args.walk) < 2:
        raise ValueError("argument --walk: it needs two prompts or more")
    frames = args.frames or 24
    if frames < len(args.walk):
        raise ValueError(f"argument --frames: {len(args.walk)} prompts need as many frames")
    is_file = args.out and Path(args.out).suffix
    with make_folder(Path(args.out or ".").parent if is_file else Path(args.out or ".")):
        check_walk(args.out)
        images = generate_walk(args, plan_frames(len(args.walk), frames))
        for path in save_walk(args.out, images):
            print(path, flush=True)


def generate_walk(args, places):
    """Returns the images at the places of `walk.plan_frames`: a list of uint8 arrays."""
    model, own = open_model(args)
    import numpy as np

    from stable_diffusion.noise import make_noise_source
    from stable_diffusion.samplers import choose_sampler

    first = secrets.randbelow(SEEDS) if args.seed is None else args.seed
    seeds = [(first + n) % SEEDS for n in range(len(args.walk) + 1)]
    jobs = [Job(text, args.negative, first, Path()) for text in args.walk]
    if not args.syntax:
        show_hint(NAME, jobs)
    encode = make_encode(model, jobs, False, args.clip_skip, args.syntax)
    contexts = np.asarray(model.encode_text(args.walk, args.clip_skip, args.syntax))
    negative = encode([args.negative])
    noise = make_noise_source(model.latent_shape, len(seeds), seeds, args.noise_source)()
    sampler, spacing = choose_sampler(args.sampler, args.spacing, model.config)
    alpha = model.config.schedule.levels(args.steps, spacing, sampler)[0].alpha

    images = []
    while len(images) < len(places):
        done = len(images)
        some = places[done : done + args.batch]

        def show_step(step, *_, done=done):
            frames = f"{done} of {len(places)} frames generated"
            show_progress(f"{frames}, step {step + 1} of {args.steps} ")

        starts = [mix_on_sphere(noise[n], noise[n + 1], share) for n, share in some]
        images += list(
            model.generate_image(
                np.stack([mix_linearly(contexts[n], contexts[n + 1], share) for n, share in some]),
                negative,
                len(some),
                args.steps,
                args.guidance,
                latent=sampler.start(np.stack(starts), alpha),
                seed=[seeds[-1]] * len(some),  # of the noise in each step of some samplers
                verbose=0,
                callback=show_step,
                sampler=args.sampler,
                spacing=args.spacing,
                noise_source=args.noise_source,
                guidance_rescale=args.guidance_rescale or 0.0,
                **own,
            )
        )
    show_progress("")
    return images


def write_images(args, jobs):
    """Generates the images of `Job`s, and writes them."""
    if args.crop is not None and not all(job.mask for job in jobs):
        raise ValueError("argument --crop: it needs --mask")
    if args.lora_folder and not args.syntax:
        raise ValueError("argument --lora-folder: it needs --syntax webui")
    for path in (path for job in jobs for path in (job.path, job.animation) if path):
        check_output(path)
    if not args.syntax:
        show_hint(NAME, jobs)

    model, own = open_model(args)
    from stable_diffusion.checks import find_first_step

    if args.syntax:
        find_loras(jobs, args.lora_folder)
    texts = {job.path: describe_job(args, job, model) for job in jobs}
    if args.prompts:
        ignored = (KEY, "batch")
        missing = [job for job in jobs if not is_generated(job.path, texts[job.path], ignored)]
        if len(missing) < len(jobs):
            there = f"{len(jobs) - len(missing)} of {len(jobs)} images"
            print_message(NAME, f"{there} are there already, generated with these options")
        jobs = missing
    at_once = not args.prompts and not any(job.loras for job in jobs)
    encode = make_encode(model, jobs, at_once, args.clip_skip, args.syntax)

    done, loaded, previews = 0, (), []
    if args.animate:
        own["preview"] = lambda step, images: previews.append(images)
    if args.preview_vae is not None:
        own["preview_decoder"] = load_preview_decoder(args.preview_vae, model)
    for batch in list_batches(jobs, args.batch, args.syntax and model):
        if loaded != batch[0].loras:
            load_loras(model, batch[0].loras)
            loaded = batch[0].loras
        first = find_first_step(args.steps, batch[0].strength or 1)
        taken = args.steps - first
        steps = f"{taken}" if taken == args.steps else f"{taken} ({taken} of {args.steps} steps)"

        def show_step(step, *_, first=first, steps=steps, done=done):
            images = f"{done} of {len(jobs)} images generated"
            show_progress(f"{images}, step {step - first + 1} of {steps} ")

        previews.clear()
        place, size = args.place or (0, len(batch))
        filled = batch * size if args.place else batch  # rounding may differ from place to place
        images = generate_batch(model, encode, args, filled, own | {"callback": show_step})
        show_progress("")
        for n, job in enumerate(batch, place):
            text = texts[job.path] | ({"batch": f"{n + 1} of {size}"} if size > 1 else {})
            write_png(job.path, images[n], text | {KEY: make_parameters(text)})
            print(job.path, flush=True)
            if job.animation:
                animate_image(job.animation, [each[n] for each in previews], images[n])
                print(job.animation, flush=True)
        done += len(batch)
    load_loras(model, ())


def list_batches(jobs, size, model=None):
    """Returns lists of at most `size` successive `Job`s that can be generated together.

    With a model whose prompts have any length, their contexts have the same length, so that an
    image is the same in any batch.
    """

    def describe(job):
        lengths = count_chunks(model, job) if model else None
        return job.image is None, job.strength, job.mask is None, job.loras, lengths

    groups = (list(group) for _, group in groupby(jobs, describe))
    return [group[n : n + size] for group in groups for n in range(0, len(group), size)]


def generate_batch(model, encode, args, batch, options):
    """Generates the images of `Job`s of one kind: a uint8 array `(H, W, 3)` for each."""
    from stable_diffusion.masks import read_mask

    given, generate = options, model.text_to_image
    files = [(job.image, job.mask) for job in batch]
    files = files[:1] if len({*files}) == 1 else files  # one for all is read and encoded once
    if batch[0].image:
        generate = model.image_to_image
        given = options | {"image": [image for image, _ in files], "strength": batch[0].strength}
    if batch[0].mask:
        generate = model.inpaint
        masks = [read_mask(mask, white_keeps=False) for _, mask in files]
        given = given | {"mask": masks, "crop": args.crop}
    return generate(
        encode([job.text for job in batch]),
        **given,
        negative_prompt=encode([job.negative for job in batch]),
        num_steps=args.steps,
        unconditional_guidance_scale=args.guidance,
        seed=[job.seed for job in batch],
        verbose=0,
        sampler=args.sampler,
        spacing=args.spacing,
        noise_source=args.noise_source,
        guidance_rescale=args.guidance_rescale or 0.0,
    )


def make_encode(model, jobs, at_once, clip_skip=0, syntax=None):
    """Returns a function that encodes a list of texts of `jobs`, `(texts, T, D)`.

    Tells the user which words the model has never seen.

    Args:
        model: the `StableDiffusion`.
        jobs: list of `Job`.
        at_once: whether to encode all texts now, and then to free the text encoder's memory. This
            is for few texts: their contexts stay in memory.
        clip_skip, syntax: see `StableDiffusion.encode_text`.

    Raises:
        ValueError: a text that `StableDiffusion.encode_text` refuses.
    """
    import numpy as np

    from stable_diffusion.checkpoints import release
    from stable_diffusion.prompts import BREAK, check_prompts, read_weights

    texts = list(dict.fromkeys(text for job in jobs for text in (job.text, job.negative)))
    check_prompts(model, texts, syntax)  # raises the error before the first image is generated
    parts = [part for text in texts for part in read_weights(text)] if syntax else []
    words = [part[0] for part in parts if part != BREAK] if syntax else texts
    if unseen := find_unseen_words(model.checkpoint, words):
        print_message(NAME, f"the weights never saw these words: {', '.join(unseen)}")
    # One by one, so that a context does not depend on the batch.
    encode = partial(model.encode_text, clip_skip=clip_skip, prompt_syntax=syntax)
    if not at_once:
        return lambda texts: np.concatenate([encode(text) for text in texts])
    encoded = {text: encode(text) for text in texts}
    if model.checkpoint.loads:
        release(model, "text_encoder")
    return lambda texts: np.concatenate([encoded[text] for text in texts])


def parse_arguments(argv):
    """Returns the arguments; with `--redo` also those that its PNG has, and `place`.

    Raises:
        ValueError: arguments that exclude each other, and as `read_redo` and `check_redo`.
    """
    parser, argv = get_parser(), sys.argv[1:] if argv is None else argv
    args = parser.parse_intermixed_args(argv)
    if args.info and len(argv) > 2:
        raise ValueError("argument --info: no other arguments are allowed")
    if not args.redo:
        return args
    if args.prompt or args.prompts:
        raise ValueError("argument --redo: the PNG has the prompt, and no other is allowed")
    text, recorded = read_redo(args.redo)
    args = parser.parse_intermixed_args([*recorded, *argv])
    args.prompt = [parse_text(text["prompt"])]
    args.out = args.out or f"{Path(args.redo).stem}-redo.png"
    args.place, args.recorded = None if args.batch > 1 else read_place(text), text
    check_redo(NAME, args, text)
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command with `argv`, or this process's arguments; returns its exit status."""

    def work(argv):
        generate_images(parse_arguments(argv))

    return run_command(NAME, work, argv)


if __name__ == "__main__":
    sys.exit(main())

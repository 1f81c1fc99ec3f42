"""The command `stable-diffusion-finetune`: fine-tunes on a folder of images."""

import hashlib
import importlib.util
import json
import re
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

from stable_diffusion.command.arguments import (
    DISTRIBUTIONS,
    DTYPES,
    FILE_SUFFIXES,
    LORA_KEYS,
    LORA_TARGETS,
    RATE_SCHEDULES,
    SEEDS,
    TRAINED_PARAMETERS,
    Parser,
    add_checkpoint_options,
    add_clip_skip,
    make_number_type,
    open_with_options,
    parse_colour,
    parse_text,
)
from stable_diffusion.command.terminal import SIGNALLED, run_command, silence_tensorflow

NAME = "stable-diffusion-finetune"
USAGE = f"{NAME} IMAGES --method METHOD --out OUT [options]"
DESCRIPTION = "Fine-tunes a Stable Diffusion on a folder of images, and writes what it learned."
EPILOG = f"""\
Captions. metadata.jsonl or metadata.csv (with file_name and text) in the folder has the captions.
Without such a file they are beside cat.png in cat.png.txt, cat.png.caption, cat.txt or cat.caption;
the first of these counts. With --prompt all images have this caption instead. If it is given
several times, one of them is chosen each time an image is used. --dry-run lists captions that are
too long, and --truncate cuts them.

methods, and what each writes to --out:
  full               trains the UNet, or only its cross-attention (--parameters cross-attention);
                     writes a folder in diffusers' layout
  lora               trains small matrices beside the UNet's kernels; writes a .safetensors file
                     for load_lora
  textual-inversion  trains vectors of the new word --token; writes a .safetensors file for
                     load_embedding
  dreambooth         trains as full or, with --parameters lora, as lora; first it generates images
                     of --class-prompt, and trains on them too, so that the model does not forget
                     the class

Everything else goes to the folder --work: settings.json, the state, loss.csv, loss.png, previews/
and tensorboard/. If a run was stopped, by Ctrl-C or otherwise, give the same command again: it goes
on from the last saved step, with the losses that it would have had. More --steps let a finished run
go on; with --schedule cosine the rate then follows the new number of steps. --restart begins anew.
A loss or parameter that is not finite ends the run: the last saved state is kept, and nothing goes
to --out.

Several devices need the JAX backend. --distribute data gives each device a part of each batch,
--distribute model a part of the parameters. For several processes start the same command in each,
with the variables KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES and _PROCESS_ID set; they share
--work.

examples:
  {NAME} images --method lora --out cat.safetensors --steps 500
  {NAME} images --method textual-inversion --out cat.safetensors \\
      --token "<my-cat>" --initializer cat --prompt "a photo of <my-cat>"
  {NAME} images --method dreambooth --out my-cat/ \\
      --prompt "a photo of sks cat" --class-prompt "a photo of a cat"

exit status: 0 done, 1 failed, 2 arguments or data that cannot be used,
130 stopped by Ctrl-C, 143 by SIGTERM
"""
RATES = {"full": 1e-5, "lora": 1e-4, "textual-inversion": 5e-3, "dreambooth": 5e-6}
FREE_ARGUMENTS = {  # those that may change when a run goes on
    "out",
    "work",
    "cache",
    "steps",
    "save_every",
    "preview",
    "preview_every",
    "preview_steps",
    "guidance",
    "restart",
    "dry_run",
    "distribute",
    "model_devices",
    "jit",
    "remat",
    "keys",
    "save_dtype",
}
CLASS_FOLDER = re.compile("class-[0-9a-f]{8}")  # in --work
CLASS_STEPS, CLASS_BATCH = 50, 4  # of images of the class
GIB = 2**30
# In --work.
STATE, LOG, CURVE = "state.safetensors", "loss.csv", "loss.png"
SETTINGS, RUN_LOCK = "settings.json", ".stable-diffusion-run"


def get_parser():
    """Returns the parser of the command line."""
    parser = Parser(NAME, usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    count, natural = make_number_type(int, 1), make_number_type(int, 0)
    share, positive = make_number_type(float, 0, 1), make_number_type(float, 0)
    add = parser.add_argument
    add("images", metavar="IMAGES", type=Path, help="a folder of images with captions; see below")
    add("--method", choices=list(RATES), required=True, help="see below")
    add("--out", type=Path, required=True, help="where the result goes; see below")
    add("--work", type=Path, help="folder of the run (default: OUT.work)")
    add("--weights", default="emoji", type=parse_text, help="where to start (default: emoji)")
    add_checkpoint_options(parser)

    add = parser.add_argument_group("what is trained").add_argument
    add("--parameters", choices=[*TRAINED_PARAMETERS, "lora"], help="default: all")
    add("--rank", type=count, default=4, help="of a LoRA (default: 4)")
    add("--alpha", type=positive, help="of a LoRA (default: the rank)")
    add(
        "--targets",
        choices=LORA_TARGETS,
        default="attention",
        help="which kernels get a LoRA (default: attention)",
    )
    add(
        "--keys",
        choices=LORA_KEYS,
        default="kohya",
        help="the convention for names in a LoRA's file (default: kohya)",
    )
    add("--token", type=parse_text, help="the new word of textual inversion, such as <cat>")
    add("--initializer", type=parse_text, help="a known word; the new one starts with its vector")
    add("--vectors", type=count, default=1, help="of the new word (default: 1)")
    add(
        "--class-prompt",
        action="append",
        type=parse_text,
        help="a prompt for images of the class; may be given several times",
    )
    add("--class-images", type=count, default=100, help="how many to generate (default: 100)")
    add(
        "--class-folder",
        type=Path,
        help="use these images instead; with --class-prompt, all of them have this caption",
    )
    add(
        "--prior-weight",
        type=positive,
        default=1.0,
        help="weight of the class in the loss; 0 trains without the class (default: 1)",
    )

    add = parser.add_argument_group("images").add_argument
    add("--prompt", action="append", type=parse_text, help="caption of every image; see below")
    add("--truncate", action="store_true", help="cut captions that are too long; see below")
    add(
        "--repeats-from-folders",
        action="store_true",
        help="use images in a folder such as 10_cat 10 times as often, as kohya's programs do",
    )
    add("--height", type=count, help="in pixels (default: the weights' own size)")
    add("--width", type=count, help="in pixels (default: the weights' own size)")
    add(
        "--crops",
        type=count,
        default=1,
        help="how many random crops of each image are used; 1 uses the centre (default: 1)",
    )
    add("--flip", action="store_true", help="use the mirror images, too")
    add(
        "--background",
        type=parse_colour,
        default=(255, 255, 255),
        help="colour under transparent parts (default: white)",
    )
    add("--cache", type=Path, help="folder of latents and contexts (default: in --work)")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=count, default=500, help="number of batches (default: 500)")
    add("--batch", type=count, default=4, help="images in a batch (default: 4)")
    add(
        "--accumulate",
        type=count,
        default=1,
        help="batches for each update; it divides --steps (default: 1)",
    )
    add("--optimizer", default="adamw", help="any of Keras' optimizers (default: adamw)")
    rates = ", ".join(f"{rate:g} for {method}" for method, rate in RATES.items())
    add(
        "--rate",
        type=positive,
        help=f"learning rate (default: {rates}; with --parameters lora that of lora)",
    )
    add(
        "--schedule",
        choices=RATE_SCHEDULES,
        default="constant",
        help="of the learning rate (default: constant)",
    )
    add("--warmup", type=natural, default=0, help="batches until the full rate (default: 0)")
    add("--weight-decay", type=positive, help="default: the optimizer's own")
    add(
        "--clip",
        type=positive,
        default=1.0,
        help="greatest norm of a gradient; 0 does not clip (default: 1)",
    )
    add(
        "--ema",
        type=share,
        default=0.0,
        help="momentum of the moving average of the parameters; 0 is without (default: 0)",
    )
    add(
        "--dropout",
        type=share,
        default=0.1,
        help="share of images that are trained without their caption (default: 0.1)",
    )
    add_clip_skip(add)
    add("--offset", type=positive, default=0.0, help="strength of offset noise (default: 0)")
    add("--snr-gamma", type=positive, help="Min-SNR weighting, 5 in the paper (default: without)")
    add("--seed", type=make_number_type(int, 0, SEEDS - 1), default=0, help="default: 0")
    add(
        "--dtype",
        choices=["float32", "mixed_bfloat16", "mixed_float16", "bfloat16"],
        default="float32",
        help="of computation; bfloat16 also of parameters and optimizer (default: float32)",
    )
    add(
        "--remat",
        action="store_true",
        help="compute activations twice: needs less memory and more time",
    )
    add("--jit", action="store_true", help="compile with XLA on TensorFlow; JAX always compiles")
    add("--distribute", choices=DISTRIBUTIONS, help="use several devices; see below")
    add("--model-devices", type=count, help="devices that share the parameters (default: all)")

    add = parser.add_argument_group("the run").add_argument
    add("--save-every", type=count, default=100, help="steps between saved states (default: 100)")
    add(
        "--preview",
        action="append",
        type=parse_text,
        help="a prompt for an image from time to time; may be given several times",
    )
    add(
        "--preview-every",
        type=natural,
        default=0,
        help="steps between previews; 0 is only at the beginning and the end (default: 0)",
    )
    add("--preview-steps", type=count, default=30, help="steps of the sampler (default: 30)")
    add(
        "--guidance",
        type=positive,
        help="of previews (default: the one that the weights come with; 7.5 if they have none)",
    )
    add("--save-dtype", choices=DTYPES, default="float32", help="of the result (default: float32)")
    add("--restart", action="store_true", help="forget what --work has of this run")
    add("--dry-run", action="store_true", help="check the data, count parameters and memory, end")
    return parser


def check_arguments(args):
    """Compares the arguments with each other, and fills in defaults that depend on others.

    Raises:
        ValueError: arguments that exclude each other, or one that is missing.
    """
    if args.method == "textual-inversion":
        if not args.token or not args.initializer:
            raise ValueError("--method textual-inversion needs --token and --initializer")
    elif args.token or args.initializer:
        raise ValueError("--token and --initializer are for --method textual-inversion")
    if args.method == "dreambooth":
        if args.prior_weight and not args.class_prompt and not args.class_folder:
            raise ValueError(
                "--method dreambooth needs --class-prompt or --class-folder, or --prior-weight 0"
            )
    elif args.class_prompt or args.class_folder:
        raise ValueError("--class-prompt and --class-folder are for --method dreambooth")
    if args.parameters and args.method not in ("full", "dreambooth"):
        raise ValueError("--parameters is for --method full and dreambooth")
    if args.parameters == "lora" and args.method == "full":
        raise ValueError("--parameters lora is for dreambooth; there is --method lora")
    args.parameters = "lora" if args.method == "lora" else args.parameters or "all"
    if args.rate is None:
        args.rate = RATES["lora" if args.parameters == "lora" else args.method]
    if rest := args.steps % args.accumulate:
        less = max(args.steps - rest, args.accumulate)
        raise ValueError(
            f"--steps {args.steps} is no multiple of --accumulate {args.accumulate}; the nearest "
            f"are {less} and {less + args.accumulate}"
        )
    if args.model_devices and args.distribute != "model":
        raise ValueError("--model-devices is for --distribute model")
    suffix, single = args.out.suffix.lower(), writes_one_file(args)
    if single and suffix != ".safetensors":
        raise ValueError(f"--out must be a .safetensors file for this method, not {args.out}")
    if not single and suffix in FILE_SUFFIXES and not args.out.is_dir():
        raise ValueError(f"--out must be a folder for this method, not {args.out}")
    args.work = args.work or args.out.with_name(f"{args.out.name}.work")
    args.cache = args.cache or args.work / "cache"
    args.preview = args.preview or []


def writes_one_file(args):
    """Returns whether the result is one file, and not a folder in diffusers' layout."""
    return args.parameters == "lora" or args.method == "textual-inversion"


def check_outputs(args):
    """Checks that the result and the files of the run can be written, and changes nothing.

    Raises:
        ValueError, OSError: see `replacing.check_output`.
    """
    from stable_diffusion.checkpoints.diffusers import DIFFUSERS_FOLDER
    from stable_diffusion.replacing import check_folder, check_output

    check_output(args.out, None if writes_one_file(args) else DIFFUSERS_FOLDER)
    for folder in (args.work, args.cache):
        check_folder(folder)
    for name in (SETTINGS, STATE, LOG, CURVE) if args.work.is_dir() else ():
        check_output(args.work / name)


def check_captions(args, examples):
    """Raises a ValueError that lists the captions in which the new word is not found."""
    if not args.token:
        return
    import regex

    from stable_diffusion.added_tokens import make_token_pattern

    pattern = make_token_pattern(args.token)
    texts = [(text, example.path) for example in examples for text in example.captions]
    texts_without = [pair for pair in texts if not regex.search(pattern, pair[0])]
    without = [f"{text!r:.200} of {path}" for text, path in texts_without]
    if without:
        more = ", ..." if len(without) > 10 else ""
        raise ValueError(
            f"{len(without)} of {len(texts)} captions lack {args.token}: "
            f"{', '.join(without[:10])}{more}"
        )


def read_examples(args, say):
    """Lists the images of both folders with their captions.

    Returns:
        Two lists of `Example`: the images, and those of --class-folder.
    """
    from stable_diffusion.training.folder import REPEATS, read_folder

    # Any of these may be inside the folder of images.
    own = [args.images, args.out, args.work, args.cache]
    own += [args.work / name for name in ("previews", "tensorboard", CURVE)]
    own += [path for path in args.work.glob("class-*") if CLASS_FOLDER.fullmatch(path.name)]
    own += [args.class_folder] if args.class_folder else []
    repeats = args.repeats_from_folders
    examples, known = read_folder(args.images, args.prompt, own, repeats), []
    inside = (example.path.relative_to(args.images).parent.parts for example in examples)
    names = sorted({name for parts in inside for name in parts if REPEATS.fullmatch(name)})
    if names and not repeats:
        say(f"folders such as {names[0]} repeat their images only with --repeats-from-folders")
    if args.class_folder and args.prior_weight:
        known = read_folder(args.class_folder, args.class_prompt, own)
    return examples, known


def find_long_texts(args, tokenizer, examples):
    """Finds captions of more than `MAX_PROMPT_LENGTH` tokens, see `captions.find_long_captions`.

    Raises:
        ValueError: a prompt for previews or for images of the class is too long.
    """
    from stable_diffusion.stable_diffusion import MAX_PROMPT_LENGTH
    from stable_diffusion.training.captions import find_long_captions

    if args.token:
        tokenizer.add_tokens(args.token)
        tokenizer.vectors[args.token] = [tokenizer.encoder[args.token]] * args.vectors
    for text in [*args.preview, *([] if args.class_folder else args.class_prompt or [])]:
        if (length := len(tokenizer.encode(text))) > MAX_PROMPT_LENGTH:
            raise ValueError(
                f"a prompt has {length} tokens, more than {MAX_PROMPT_LENGTH}: {text!r:.200}"
            )
    return find_long_captions(tokenizer, examples, MAX_PROMPT_LENGTH)


@contextmanager
def lock_run(args, process):
    """Locks --work for the time of the block, so that no other run writes to it.

    Args:
        args: the arguments.
        process: index of this process. The first one has the lock for all of them.

    Raises:
        ValueError: another run has the lock.
    """
    from stable_diffusion.locking import drop_lock, take_lock

    if process:
        yield
        return
    args.work.mkdir(parents=True, exist_ok=True)
    lock = take_lock(args.work / RUN_LOCK)
    if lock is None:
        raise ValueError(f"another run uses {args.work}; wait for its end, or pass another --work")
    try:
        yield
    finally:
        drop_lock(lock, args.work / RUN_LOCK)


def compare_settings(args):
    """Writes the settings of a new run; compares those of a run that goes on.

    Raises:
        ValueError: the run that goes on had other settings, or they are lost.
    """
    from stable_diffusion.checkpoints.contents import check_file, quote
    from stable_diffusion.replacing import replace_file

    path = args.work / SETTINGS
    keys = [key for key in vars(args) if key not in FREE_ARGUMENTS]
    settings = {key: format_setting(getattr(args, key)) for key in keys}
    if not args.restart and (args.work / STATE).is_file():
        try:
            check_file(path)
            before = dict(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path} is missing or damaged, so that this run can't be compared with the one in "
                f"{args.work}; --restart begins anew"
            ) from error
        # An older version of this command did not know all settings: it ran with their defaults.
        default = get_parser().get_default
        before = {key: format_setting(default(key)) for key in settings} | before
        different = [key for key in settings if before[key] != settings[key]]
        if different:
            key = different[0]
            raise ValueError(
                f"{args.work} has a run with --{key.replace('_', '-')} {quote(before.get(key))}, "
                f"not {settings[key]}; --restart begins anew, and another --work keeps both"
            )
    args.work.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as written:
        written.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def format_setting(value):
    """Returns a value as settings.json has it."""
    return value if isinstance(value, int | float | list | type(None)) else str(value)


def make_method(args, pipeline):
    """Returns the `Method` that the arguments ask for."""
    from stable_diffusion.training import Full, LoRA, TextualInversion

    if args.method == "textual-inversion":
        word = args.token, args.initializer, args.vectors
        return TextualInversion(pipeline, *word, args.clip_skip)
    if args.parameters == "lora":
        return LoRA(pipeline, args.rank, args.alpha, args.targets)
    return Full(pipeline, args.parameters)


def make_optimizer(args):
    """Returns the optimizer that the arguments ask for."""
    from stable_diffusion.training import optimizers

    options = {"weight_decay": args.weight_decay} if args.weight_decay is not None else {}
    if args.clip:
        options["clipnorm"] = args.clip
    if args.accumulate > 1:
        options["gradient_accumulation_steps"] = args.accumulate
    if args.ema:
        options |= {"use_ema": True, "ema_momentum": args.ema}
    return optimizers.make_optimizer(
        args.optimizer, args.rate, args.steps, args.schedule, args.warmup, **options
    )


def open_pipeline(args):
    """Returns a new pipeline; its components are built when they are needed."""
    from stable_diffusion.stable_diffusion import StableDiffusion

    size = args.height, args.width
    return StableDiffusion(*size, args.jit, open_with_options(args, args.weights))


def generate_class_images(args):
    """Generates images of the class with the model as it is before training.

    Their folder is one with metadata.jsonl, like any other. Images that it already has are kept.

    Returns:
        List of `Example`.

    Raises:
        ValueError: a prompt that is too long.
    """
    import keras
    from PIL import Image

    from stable_diffusion.replacing import replace_file
    from stable_diffusion.training import read_folder

    key = args.weights, args.class_prompt, args.height, args.width
    # Folders of older runs have none of these.
    names = ("variant", "vae", "prediction_type", "clip_skip")
    key += tuple((name, getattr(args, name)) for name in names if getattr(args, name))
    folder = args.work / f"class-{hashlib.sha256(repr(key).encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [args.class_prompt[n % len(args.class_prompt)] for n in range(args.class_images)]
    files = [f"{seed:05}.png" for seed in range(len(prompts))]
    with replace_file(folder / "metadata.jsonl") as written:
        rows = [{"file_name": f, "text": t} for f, t in zip(files, prompts, strict=True)]
        written.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    missing = [seed for seed, file in enumerate(files) if not (folder / file).is_file()]
    pipeline = open_pipeline(args) if missing else None
    bar = keras.utils.Progbar(len(files), unit_name="image")
    for start in range(0, len(missing), CLASS_BATCH):
        seeds = missing[start : start + CLASS_BATCH]
        images = pipeline.text_to_image(
            [prompts[seed] for seed in seeds],
            num_steps=CLASS_STEPS,
            seed=seeds,
            clip_skip=args.clip_skip,
            verbose=0,
        )
        for seed, image in zip(seeds, images, strict=True):
            with replace_file(folder / files[seed]) as written:
                Image.fromarray(image).save(written, "png")
        bar.update(len(files) - len(missing) + start + len(seeds))
    wanted = {folder / file for file in files}  # there may be others, from a run with more images
    return read_folder(folder, exclude=[path for path in folder.iterdir() if path not in wanted])


def count_usable(examples, background, kind):
    """Returns how often images that can be opened are used; prints why others cannot."""
    from stable_diffusion.images import open_image

    usable = []
    for example in examples:
        try:
            open_image(example.path, background)
            usable.append(example.repeats)
        except ValueError as error:
            print(f"skipped: {error}")
    print(f"{kind}: {len(usable)} usable, {len(examples) - len(usable)} skipped")
    return sum(usable)


def print_plan(args, pipeline, examples, known, long):
    """Prints what the run would do: images, captions, parameters, memory and steps.

    Args:
        args: the arguments.
        pipeline: the pipeline before training.
        examples: list of `Example`.
        known: list of `Example`, those of --class-folder.
        long: the result of `find_long_texts`.
    """
    import keras

    from stable_diffusion.stable_diffusion import MAX_PROMPT_LENGTH
    from stable_diffusion.training.optimizers import count_memory

    usable = count_usable(examples, args.background, "images")
    if known:
        count_usable(known, args.background, "images of the class")
    captions = {text for example in examples for text in example.captions}
    print(f"captions: {len(captions)}, such as {min(captions)!r}")
    for caption, (length, paths) in long.items():
        print(f"too long: {length} tokens: {', '.join(map(str, paths))}: {caption!r}")
    if args.method == "textual-inversion":  # needs the vectors of --initializer
        model = make_method(args, pipeline).model
    else:
        size = pipeline.img_height, pipeline.img_width
        with keras.StatelessScope(initialize_variables=False):  # only shapes, no memory
            pipeline._diffusion_model = pipeline.DiffusionModel(
                *size, MAX_PROMPT_LENGTH, download_weights=False, config=pipeline.config.unet
            )
            model = make_method(args, pipeline).model
    memory = count_memory(model, lambda: make_optimizer(args))
    trained, total = memory["trained"], memory["all"]
    print(f"parameters: {trained:,} of {total:,} are trained ({100 * trained / total:.2f} %)")
    for key in ("parameters", "gradients", "optimizer"):
        print(f"memory: {memory[key] / GIB:8.3f} GiB {key}")
    print("memory: activations are not counted; --remat needs less for them")
    passes = args.steps * args.batch / max(1, usable)
    print(f"steps: {args.steps} of {args.batch} images, {passes:.1f} times through all")


def prepare_data(args, source, examples, known, process, say):
    """Computes latents and contexts, in float32 and on one device.

    Args:
        args: the arguments.
        source: the pipeline before training.
        examples: list of `Example`.
        known: list of `Example`, those of --class-folder.
        process: index of this process.
        say: prints a line.

    Returns:
        A `Cache` and a list of `Stream`.
    """
    import keras

    from stable_diffusion.config import COMPONENTS
    from stable_diffusion.training import Cache, Stream

    for component in COMPONENTS:  # also those that only the result or a preview needs
        source.checkpoint.check(component)
    views = args.crops, args.flip, args.background
    cache = Cache(args.cache, source, *views, clip_skip=args.clip_skip)
    with_texts = args.method != "textual-inversion"
    bar = keras.utils.Progbar(len(examples), unit_name="image", verbose=int(process == 0))
    examples, broken = cache.encode_examples(examples, with_texts, lambda done, _: bar.update(done))
    for reason in broken:
        say(f"skipped: {reason}")
    say(f"{len(examples)} images, {len(broken)} skipped")
    streams = [Stream(examples)]
    if args.method == "dreambooth" and args.prior_weight:
        known, broken = cache.encode_examples(known or generate_class_images(args))
        for reason in broken:
            say(f"skipped, an image of the class: {reason}")
        streams.append(Stream(known, args.prior_weight))
    if with_texts:
        cache.encode_texts([""])
    source._text_encoder = source._image_encoder = None  # built again only if a file is lost
    return cache, streams


def build_method(args):
    """Returns the `Method`, with its model compiled and its optimizer built."""
    import keras

    from stable_diffusion.training import distribution, remat_scope

    keras.config.set_dtype_policy(args.dtype)
    keras.utils.set_random_seed(args.seed)
    if args.distribute:
        distribution.distribute_models(args.distribute, args.model_devices)
    pipeline = open_pipeline(args)
    if args.remat:
        with remat_scope(pipeline.config.unet):
            pipeline.diffusion_model  # noqa: B018  builds it
    method = make_method(args, pipeline)
    model = method.compile(make_optimizer(args), jit_compile=args.jit)
    model.optimizer.build(model.trainable_variables)
    return method


def load_run(args, model, data):
    """Loads the state of a run that goes on; returns its step, or 0 for a new run.

    Args:
        args: the arguments.
        model: the model, compiled.
        data: a hash of the data.
    """
    from stable_diffusion.training import load_state

    if args.restart or not (args.work / STATE).is_file():
        return 0
    try:
        step = load_state(args.work / STATE, model, data)
    except ValueError as error:
        raise ValueError(f"{error} --restart begins anew.") from error
    if step > args.steps:
        raise ValueError(f"{args.work} already has a run of {step} steps, more than {args.steps}")
    return step


def make_callbacks(args, method, images, first, data, say, alone):
    """Makes the callbacks of training: they save the state, log losses and generate previews.

    Args:
        args: the arguments.
        method: the `Method`.
        images: number of images in a batch.
        first: number of steps that earlier runs took.
        data: a hash of the data.
        say: prints a line.
        alone: whether this is the only process.

    Returns:
        The `SaveState`, and a list of the others.
    """
    from stable_diffusion.training import callbacks

    saver = callbacks.SaveState(args.work / STATE, args.save_every, args.steps, first, data)
    log = callbacks.Log(args.work / LOG, images, args.steps, first, sys.stdout.isatty())
    others, show = [log, callbacks.StopAtNaN(first)], None
    if importlib.util.find_spec("tensorboard"):
        summaries = callbacks.Summaries(args.work / "tensorboard", first)
        others.append(summaries)
        show = summaries.write_image
    else:
        say("no TensorBoard: it is not installed (pip install tensorboard)")
    if args.preview and not alone:
        say("no previews: several processes generate none")
    elif args.preview:
        options = {
            "num_steps": args.preview_steps,
            "unconditional_guidance_scale": args.guidance,
            "clip_skip": args.clip_skip,
        }
        preview = callbacks.Preview(
            method,
            args.preview,
            args.work / "previews",
            args.preview_every,
            args.steps,
            first,
            args.seed,
            options,
            show,
        )
        others.append(preview)
    return saver, others


def save_result(args, method):
    """Writes the result to `--out`."""
    keys = {"keys": args.keys} if args.parameters == "lora" else {}
    method.save(args.out, dtype=args.save_dtype, **keys)


def run_training(args, source, examples, known, process, processes, say):
    """Trains, and writes the result; returns the exit status.

    Args:
        args: the arguments.
        source: the pipeline before training.
        examples: list of `Example`.
        known: list of `Example`, those of --class-folder.
        process: index of this process.
        processes: number of processes.
        say: prints a line.
    """
    import keras

    from stable_diffusion.training import NoisyLatents, callbacks
    from stable_diffusion.training.data import hash_streams

    if process == 0:
        compare_settings(args)
    cache, streams = prepare_data(args, source, examples, known, process, say)
    method, hashed = build_method(args), hash_streams(streams)
    model, first = method.model, load_run(args, method.model, hashed)
    if first:
        say(f"going on after step {first} of {args.steps}")
    used, saver = [callbacks.StopAtNaN(first)], None
    if process == 0:
        images = args.batch * len(streams)
        saver, used = make_callbacks(args, method, images, first, hashed, say, processes == 1)
    data = NoisyLatents(
        cache,
        streams,
        method.pipeline.config.schedule,
        batch_size=args.batch,
        steps=max(1, args.steps - first),
        first_step=first,
        seed=args.seed,
        dropout=args.dropout,
        offset=args.offset,
        snr_gamma=args.snr_gamma,
        tokenize=method.tokenize,
        process=(process, processes),
    )
    if first < args.steps:
        # One of several processes must not stop by itself: the others would wait for it.
        with callbacks.stop_on_signals(saver) if processes == 1 else nullcontext():
            model.fit(data, shuffle=False, verbose=0, callbacks=[*used, saver] if saver else used)
    else:
        model.optimizer.finalize_variable_values(model.trainable_variables)
    if process:
        return 0
    keras.distribution.set_distribution(None)  # other processes do not build what comes now
    if rows := callbacks.read_log(args.work / LOG):  # none if the file was lost
        callbacks.draw_curve(args.work / CURVE, rows)
    if saver.stop and saver.step < args.steps:
        say(f"stopped after step {saver.step} of {args.steps}: the same command goes on from there")
        return SIGNALLED + saver.stop
    method.update_pipeline()
    save_result(args, method)
    skip = f"; generate with --clip-skip {args.clip_skip}, as it was trained"
    say(f"wrote {args.out}{skip if args.clip_skip else ''}")
    return 0


def finetune(args):
    """Does what the arguments ask for; returns the exit status."""
    check_arguments(args)
    with silence_tensorflow():
        import keras

        from stable_diffusion.clip_skip import check_skip
        from stable_diffusion.stable_diffusion import MAX_PROMPT_LENGTH
        from stable_diffusion.training import distribution
        from stable_diffusion.training.captions import truncate_captions
        from stable_diffusion.training.methods import check_trainable
        from stable_diffusion.training.optimizers import check_precision

    distribution.check_backend()
    process, processes = distribution.join_processes()
    if processes > 1 and args.distribute != "data":
        raise ValueError("several processes need --distribute data")
    args.jit = args.jit or keras.backend.backend() == "jax"
    if process == 0:
        check_outputs(args)

    optimizer = make_optimizer(args)
    if args.method != "textual-inversion":  # the vectors of a new word are always in float32
        check_precision(optimizer, [keras.DTypePolicy(args.dtype).variable_dtype])

    def say(message):
        if process == 0:
            print(message, flush=True)

    examples, known = read_examples(args, say)
    source = open_pipeline(args)
    check_trainable(source.config)
    check_skip(source.config.text, args.clip_skip)
    tokenizer = source.checkpoint.tokenizer()  # one of its own, which may get the new word
    long = find_long_texts(args, tokenizer, examples + known)
    if long and args.truncate:
        say(f"captions of more than {MAX_PROMPT_LENGTH} tokens, which are cut: {len(long)}")
        examples, known = (
            truncate_captions(tokenizer, some, MAX_PROMPT_LENGTH) for some in (examples, known)
        )
    check_captions(args, examples)
    policy = keras.config.dtype_policy()
    try:
        if args.dry_run:
            keras.config.set_dtype_policy(args.dtype)
            print_plan(args, source, examples, known, long)
        if long and not args.truncate:
            caption, (length, paths) = next(iter(long.items()))
            raise ValueError(
                f"captions of more than {MAX_PROMPT_LENGTH} tokens: {len(long)}. That of "
                f"{paths[0]} has {length}: {caption!r:.200}; --truncate cuts them, and --dry-run "
                f"lists them"
            )
        if args.dry_run:
            return 0
        with lock_run(args, process):
            return run_training(args, source, examples, known, process, processes, say)
    finally:
        keras.config.set_dtype_policy(policy)  # for a program that calls `main` again


def main(argv: list[str] | None = None) -> int:
    """Runs the command with `argv`, or this process's arguments; returns its exit status."""

    def work(argv):
        return finetune(get_parser().parse_args(argv))

    interrupted = "interrupted: the same command goes on from the last saved step"
    return run_command(NAME, work, argv, interrupted)


if __name__ == "__main__":
    sys.exit(main())

"""The command `stable-diffusion-finetune`: fine-tunes on a folder of images."""

import hashlib
import importlib.util
import json
import sys
from contextlib import nullcontext
from pathlib import Path

from stable_diffusion.command.arguments import (
    DISTRIBUTIONS,
    DTYPES,
    LORA_KEYS,
    LORA_TARGETS,
    RATE_SCHEDULES,
    SEEDS,
    TRAINED_PARAMETERS,
    Parser,
    make_number_type,
    parse_colour,
    parse_text,
)
from stable_diffusion.command.terminal import INTERRUPTED, run_command, silence_tensorflow

NAME = "stable-diffusion-finetune"
USAGE = f"{NAME} IMAGES --method METHOD --out OUT [options]"
DESCRIPTION = "Fine-tunes a Stable Diffusion on a folder of images, and writes what it learned."
EPILOG = f"""\
Captions. metadata.jsonl or metadata.csv (with file_name and text) in the folder has the captions,
or a .txt file beside each image. With --prompt all images have this caption instead. If it is given
several times, one of them is chosen each time an image is used.

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
on from the last saved step, with the losses that it would have had. --restart begins anew.

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

exit status: 0 done, 1 failed, 2 arguments or data that cannot be used, 130 stopped
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
CLASS_STEPS, CLASS_BATCH = 50, 4  # of images of the class
GIB = 2**30
STATE, LOG = "state.safetensors", "loss.csv"  # in --work


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
    add("--class-folder", type=Path, help="use these images, with captions, instead")
    add(
        "--prior-weight",
        type=positive,
        default=1.0,
        help="weight of the class in the loss; 0 trains without the class (default: 1)",
    )

    add = parser.add_argument_group("images").add_argument
    add("--prompt", action="append", type=parse_text, help="caption of every image; see below")
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
    add("--accumulate", type=count, default=1, help="batches for each update (default: 1)")
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
        if args.prior_weight and bool(args.class_prompt) == bool(args.class_folder):
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
    if args.model_devices and args.distribute != "model":
        raise ValueError("--model-devices is for --distribute model")
    single = args.parameters == "lora" or args.method == "textual-inversion"
    if single and args.out.suffix != ".safetensors":
        raise ValueError(f"--out must be a .safetensors file for this method, not {args.out}")
    if not single and args.out.suffix:
        raise ValueError(f"--out must be a folder for this method, not {args.out}")
    args.work = args.work or args.out.with_name(f"{args.out.name}.work")
    args.cache = args.cache or args.work / "cache"
    args.preview = args.preview or []


def check_captions(args, examples):
    """Raises a ValueError if a caption lacks the new word."""
    if args.token:
        for example in examples:
            for text in example.captions:
                if args.token not in text:
                    raise ValueError(f"the caption {text!r} of {example.path} lacks {args.token}")


def compare_settings(args):
    """Writes the settings of a new run; compares those of a run that goes on.

    Raises:
        ValueError: the run that goes on had other settings.
    """
    from stable_diffusion.files import replace_file

    path = args.work / "settings.json"
    settings = {
        key: value if isinstance(value, int | float | list | type(None)) else str(value)
        for key, value in vars(args).items()
        if key not in FREE_ARGUMENTS
    }
    if path.is_file() and not args.restart and (args.work / STATE).is_file():
        before = json.loads(path.read_text("utf-8"))
        different = [key for key in settings if before.get(key) != settings[key]]
        if different:
            key = different[0]
            raise ValueError(
                f"{args.work} has a run with --{key.replace('_', '-')} {before.get(key)}, not "
                f"{settings[key]}; --restart begins anew, and another --work keeps both"
            )
    args.work.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as written:
        written.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def make_method(args, pipeline):
    """Returns the `Method` that the arguments ask for."""
    from stable_diffusion.training import Full, LoRA, TextualInversion

    if args.method == "textual-inversion":
        return TextualInversion(pipeline, args.token, args.initializer, args.vectors)
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


def open_pipeline(args, **options):
    """Returns a new pipeline; its components are built when they are needed."""
    from stable_diffusion.stable_diffusion import StableDiffusion

    options = {"weights": args.weights} | options
    return StableDiffusion(args.height, args.width, args.jit, **options)


def generate_class_images(args):
    """Generates images of the class with the model as it is before training; returns their folder.

    The folder is one with metadata.jsonl, like any other. Images that it already has are kept.

    Raises:
        ValueError: a prompt that is too long.
    """
    import keras
    from PIL import Image

    from stable_diffusion.files import replace_file

    if args.class_folder:
        return args.class_folder
    key = args.weights, args.class_prompt, args.height, args.width
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
            [prompts[seed] for seed in seeds], num_steps=CLASS_STEPS, seed=seeds, verbose=0
        )
        for seed, image in zip(seeds, images, strict=True):
            with replace_file(folder / files[seed]) as written:
                Image.fromarray(image).save(written, "png")
        bar.update(len(files) - len(missing) + start + len(seeds))
    for extra in set(folder.glob("*.png")) - {folder / file for file in files}:
        extra.unlink()  # from a run with more images
    return folder


def print_plan(args, examples):
    """Prints what the run would do: images, captions, parameters, memory and steps."""
    import keras

    from stable_diffusion.images import open_image
    from stable_diffusion.stable_diffusion import MAX_PROMPT_LENGTH
    from stable_diffusion.training.optimizers import count_memory

    usable = 0
    for example in examples:
        try:
            open_image(example.path, args.background)
            usable += 1
        except ValueError as error:
            print(f"skipped: {error}")
    captions = {text for example in examples for text in example.captions}
    print(f"images: {usable} usable, {len(examples) - usable} skipped")
    print(f"captions: {len(captions)}, such as {min(captions)!r}")
    pipeline = open_pipeline(args)
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


def prepare_data(args, process, say):
    """Computes latents and contexts, in float32 and on one device.

    Args:
        args: the arguments.
        process: index of this process.
        say: prints a line.

    Returns:
        A `Cache` and a list of `Stream`.
    """
    import keras

    from stable_diffusion.training import Cache, Stream, read_folder

    source = open_pipeline(args)
    cache = Cache(args.cache, source, args.crops, args.flip, args.background)
    with_texts = args.method != "textual-inversion"
    examples = read_folder(args.images, args.prompt)
    bar = keras.utils.Progbar(len(examples), unit_name="image", verbose=int(process == 0))
    examples, broken = cache.encode_examples(examples, with_texts, lambda done, _: bar.update(done))
    for reason in broken:
        say(f"skipped: {reason}")
    say(f"{len(examples)} images, {len(broken)} skipped")
    streams = [Stream(examples)]
    if args.method == "dreambooth" and args.prior_weight:
        known, _ = cache.encode_examples(read_folder(generate_class_images(args)))
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


def make_callbacks(args, method, images, first, say, alone):
    """Makes the callbacks of training: they save the state, log losses and generate previews.

    Args:
        args: the arguments.
        method: the `Method`.
        images: number of images in a batch.
        first: number of steps that earlier runs took.
        say: prints a line.
        alone: whether this is the only process.

    Returns:
        The `SaveState`, and a list of the others.
    """
    from stable_diffusion.training import callbacks

    saver = callbacks.SaveState(args.work / STATE, args.save_every, args.steps, first)
    log = callbacks.Log(args.work / LOG, images, args.steps, first, sys.stdout.isatty())
    others, show = [log], None
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
    args.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    method.save(args.out, dtype=args.save_dtype, **keys)


def run_training(args, process, processes):
    """Trains, and writes the result; returns the exit status."""
    import keras

    from stable_diffusion.training import NoisyLatents, callbacks, load_state

    def say(message):
        if process == 0:
            print(message, flush=True)

    if process == 0:
        compare_settings(args)
    cache, streams = prepare_data(args, process, say)
    method = build_method(args)
    model, state = method.model, args.work / STATE
    first = load_state(state, model) if state.is_file() and not args.restart else 0
    if first > args.steps:
        raise ValueError(f"{args.work} already has a run of {first} steps, more than {args.steps}")
    if first:
        say(f"going on after step {first} of {args.steps}")
    used, saver = [], None
    if process == 0:
        images = args.batch * len(streams)
        saver, used = make_callbacks(args, method, images, first, say, processes == 1)
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
            model.fit(data, shuffle=False, verbose=0, callbacks=[*used, saver] if saver else [])
    else:
        model.optimizer.finalize_variable_values(model.trainable_variables)
    if process:
        return 0
    keras.distribution.set_distribution(None)  # other processes do not build what comes now
    callbacks.draw_curve(args.work / "loss.png", callbacks.read_log(args.work / LOG))
    if saver.stop and saver.step < args.steps:
        say(f"stopped after step {saver.step} of {args.steps}: the same command goes on from there")
        return INTERRUPTED
    method.update_pipeline()
    save_result(args, method)
    say(f"wrote {args.out}")
    return 0


def finetune(args):
    """Does what the arguments ask for; returns the exit status."""
    check_arguments(args)
    with silence_tensorflow():
        import keras

        from stable_diffusion.training import distribution, read_folder

    process, processes = distribution.join_processes()
    if processes > 1 and args.distribute != "data":
        raise ValueError("several processes need --distribute data")
    args.jit = args.jit or keras.backend.backend() == "jax"
    examples = read_folder(args.images, args.prompt)
    check_captions(args, examples)
    if args.dry_run:
        keras.config.set_dtype_policy(args.dtype)
        print_plan(args, examples)
        return 0
    return run_training(args, process, processes)


def main(argv: list[str] | None = None) -> int:
    """Runs the command with `argv`, or this process's arguments; returns its exit status."""

    def work(argv):
        return finetune(get_parser().parse_args(argv))

    interrupted = "interrupted: the same command goes on from the last saved step"
    return run_command(NAME, work, argv, interrupted)


if __name__ == "__main__":
    sys.exit(main())

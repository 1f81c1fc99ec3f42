"""Fine-tunes a Stable Diffusion on a folder of pictures, in one command."""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from stable_diffusion.command.generate import Parser, complain, number

EPILOG = """\
Pictures are described by metadata.jsonl or metadata.csv (file_name, text), or by a .txt beside
each; or all by --prompt, of which there may be several.

methods, and what --out gets:
  full               the UNet, or its --parameters cross-attention    a diffusers folder
  lora               small matrices beside its kernels                a .safetensors for load_lora
  textual-inversion  vectors of the new word --token                  a .safetensors for
                                                                      load_embedding
  dreambooth         as full or, with --parameters lora, as lora; with pictures of --class-prompt
                     that are drawn first, so that the class isn't forgotten

Everything else goes to --work: settings.json, the state, loss.csv, loss.png, previews/ and
tensorboard/. A run that was stopped, by Ctrl-C or otherwise, goes on when the same command is given
again, with the losses that it would have had. --restart begins anew.

--distribute data gives each device a part of each batch, --distribute model a part of the
parameters (JAX alone). For several processes start the same command in each, with the variables
KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES and _PROCESS_ID set; they share --work.

examples:
  python scripts/finetune.py pictures --method lora --out cat.safetensors --steps 500
  python scripts/finetune.py pictures --method textual-inversion --out cat.safetensors \\
      --token "<my-cat>" --initializer cat --prompt "a photo of <my-cat>"
  python scripts/finetune.py pictures --method dreambooth --out my-cat/ \\
      --prompt "a photo of sks cat" --class-prompt "a photo of a cat"

exit status: 0 done, 1 failed, 2 arguments or data that can't be used, 130 stopped
"""
RATES = {"full": 1e-5, "lora": 1e-4, "textual-inversion": 5e-3, "dreambooth": 5e-6}
FREE = {  # arguments that may change when a run goes on
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
CLASS_STEPS, CLASS_GUIDANCE, CLASS_BATCH = 50, 7.5, 4
GIB = 2**30
STATE, LOG = "state.safetensors", "loss.csv"  # in --work
NAME = "finetune"


def colour(text):
    """The type of colours: a name or #rrggbb, as Pillow knows them."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a colour") from error


def get_parser():
    """Returns the parser of the command line."""
    parser = Parser(
        prog=NAME,
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    count, share, some = number(int, 1), number(float, 0, 1), number(float, 0)
    add = parser.add_argument
    add("pictures", type=Path, help="a folder of pictures with captions")
    add("--method", choices=list(RATES), required=True, help="see below")
    add("--out", type=Path, required=True, help="where the result goes, see below")
    add("--work", type=Path, help="folder of the run (default: OUT.work)")
    add("--weights", default="emoji", help="what to start from (default: emoji)")

    add = parser.add_argument_group("what is trained").add_argument
    add("--parameters", choices=["all", "cross-attention", "lora"], help="default: all")
    add("--rank", type=count, default=4, help="of a LoRA (default: 4)")
    add("--alpha", type=some, help="of a LoRA (default: the rank)")
    add(
        "--targets",
        choices=["cross-attention", "attention", "transformers", "all"],
        default="attention",
        help="kernels with a LoRA (default: attention)",
    )
    add("--keys", choices=["kohya", "diffusers"], default="kohya", help="names in a LoRA's file")
    add("--token", help="the new word of textual inversion, such as <cat>")
    add("--initializer", help="a word that the new one starts from")
    add("--vectors", type=count, default=1, help="of the new word (default: 1)")
    add(
        "--class-prompt",
        action="append",
        help="what pictures of the class are drawn from; may be given repeatedly",
    )
    add("--class-pictures", type=count, default=100, help="how many (default: 100)")
    add("--class-folder", type=Path, help="take these, with captions, instead")
    add("--prior-weight", type=some, default=1.0, help="of the class; 0 is without (default: 1)")

    add = parser.add_argument_group("pictures").add_argument
    add("--prompt", action="append", help="caption of every picture; may be given repeatedly")
    add("--height", type=count, help="in pixels (default: the weights' native size)")
    add("--width", type=count, help="in pixels (default: the weights' native size)")
    add("--crops", type=count, default=1, help="places of random crops; 1 is the centre")
    add("--flip", action="store_true", help="also mirrored")
    add("--background", type=colour, default=(255, 255, 255), help="of transparent pictures")
    add("--cache", type=Path, help="folder of latents and contexts (default: in --work)")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=count, default=500, help="batches (default: 500)")
    add("--batch", type=count, default=4, help="pictures in a batch (default: 4)")
    add("--accumulate", type=count, default=1, help="batches of each update (default: 1)")
    add("--optimizer", default="adamw", help="any of Keras' (default: adamw)")
    rates = ", ".join(f"{rate:g} {method}" for method, rate in RATES.items())
    add("--rate", type=some, help=f"learning rate (default: {rates}; as lora with adapters)")
    add("--schedule", choices=["constant", "cosine"], default="constant")
    add("--warmup", type=number(int, 0), default=0, help="batches (default: 0)")
    add("--weight-decay", type=some, help="default: the optimizer's")
    add("--clip", type=some, default=1.0, help="norm of gradients; 0 is without (default: 1)")
    add("--ema", type=share, default=0.0, help="momentum of the average of parameters; 0 is none")
    add("--dropout", type=share, default=0.1, help="share of captions left out (default: 0.1)")
    add("--offset", type=some, default=0.0, help="strength of offset noise (default: 0)")
    add("--snr-gamma", type=some, help="Min-SNR weighting, 5 in the paper (default: without)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0)
    add(
        "--dtype",
        choices=["float32", "mixed_bfloat16", "mixed_float16", "bfloat16"],
        default="float32",
        help="of computing and, in the last, of parameters and the optimizer, too",
    )
    add("--remat", action="store_true", help="less memory, more time: compute activations twice")
    add("--jit", action="store_true", help="compile with XLA on TensorFlow; JAX always does")
    add("--distribute", choices=["data", "model"], help="see below")
    add("--model-devices", type=count, help="devices that share parameters (default: all)")

    add = parser.add_argument_group("the run").add_argument
    add("--save-every", type=count, default=100, help="steps (default: 100)")
    add("--preview", action="append", help="a prompt to draw; may be given repeatedly")
    add("--preview-every", type=number(int, 0), default=0, help="steps; 0 is at the end alone")
    add("--preview-steps", type=count, default=30, help="of the sampler (default: 30)")
    add("--guidance", type=some, default=7.5, help="of previews (default: 7.5)")
    add("--save-dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    add("--restart", action="store_true", help="forget what --work has of this run")
    add("--dry-run", action="store_true", help="check the data, count parameters and memory, end")
    return parser


def check(args):
    """Fills in what depends on other arguments.

    Raises:
        ValueError: arguments that don't go together.
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
    """Raises a ValueError if captions lack the new word."""
    if args.token:
        for example in examples:
            for text in example.captions:
                if args.token not in text:
                    raise ValueError(f"the caption {text!r} of {example.path} lacks {args.token}")


def compare_settings(args):
    """Writes the settings of a new run; those of one that goes on must be the same.

    Raises:
        ValueError: they aren't.
    """
    from stable_diffusion.files import new_file

    path = args.work / "settings.json"
    settings = {
        key: value if isinstance(value, int | float | list | type(None)) else str(value)
        for key, value in vars(args).items()
        if key not in FREE
    }
    if path.is_file() and not args.restart and (args.work / "state.safetensors").is_file():
        before = json.loads(path.read_text("utf-8"))
        different = [key for key in settings if before.get(key) != settings[key]]
        if different:
            key = different[0]
            raise ValueError(
                f"{args.work} has a run with --{key.replace('_', '-')} {before.get(key)}, not "
                f"{settings[key]}; --restart begins anew, and another --work keeps both"
            )
    args.work.mkdir(parents=True, exist_ok=True)
    with new_file(path) as written:
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
    """Returns a new pipeline; its parts are built when they are needed."""
    from stable_diffusion import StableDiffusion

    options = {"weights": args.weights} | options
    return StableDiffusion(args.height, args.width, args.jit, **options)


def draw_class(args):
    """Draws pictures of the class as the model has it before training; returns their folder.

    They are a folder like any other, with metadata.jsonl. Those that are there already are kept.

    Raises:
        ValueError: a prompt that is too long.
    """
    import keras
    from PIL import Image
    from stable_diffusion.files import new_file

    if args.class_folder:
        return args.class_folder
    key = args.weights, args.class_prompt, args.height, args.width
    folder = args.work / f"class-{hashlib.sha256(repr(key).encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [args.class_prompt[n % len(args.class_prompt)] for n in range(args.class_pictures)]
    files = [f"{seed:05}.png" for seed in range(len(prompts))]
    with new_file(folder / "metadata.jsonl") as written:
        rows = [{"file_name": f, "text": t} for f, t in zip(files, prompts, strict=True)]
        written.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    missing = [seed for seed, file in enumerate(files) if not (folder / file).is_file()]
    pipeline = open_pipeline(args) if missing else None
    bar = keras.utils.Progbar(len(files), unit_name="picture")
    for start in range(0, len(missing), CLASS_BATCH):
        seeds = missing[start : start + CLASS_BATCH]
        pictures = pipeline.text_to_image(
            [prompts[seed] for seed in seeds],
            num_steps=CLASS_STEPS,
            unconditional_guidance_scale=CLASS_GUIDANCE,
            seed=seeds,
            verbose=0,
        )
        for seed, picture in zip(seeds, pictures, strict=True):
            with new_file(folder / files[seed]) as written:
                Image.fromarray(picture).save(written, "png")
        bar.update(len(files) - len(missing) + start + len(seeds))
    for extra in set(folder.glob("*.png")) - {folder / file for file in files}:
        extra.unlink()  # of a run with more pictures
    return folder


def dry_run(args, examples):
    """Prints what the run would do."""
    import keras
    from stable_diffusion.training.folder import open_picture

    from stable_diffusion.stable_diffusion import MAX_PROMPT_LENGTH
    from stable_diffusion.training.optimizers import count_memory

    usable = 0
    for example in examples:
        try:
            open_picture(example.path, args.background)
            usable += 1
        except ValueError as error:
            print(f"skipped: {error}")
    captions = {text for example in examples for text in example.captions}
    print(f"pictures: {usable} usable, {len(examples) - usable} skipped")
    print(f"captions: {len(captions)}, as {min(captions)!r}")
    pipeline = open_pipeline(args)
    if args.method == "textual-inversion":  # takes a word's vectors from the text encoder
        model = make_method(args, pipeline).model
    else:
        size = pipeline.img_height, pipeline.img_width
        with keras.StatelessScope(initialize_variables=False):  # shapes alone, without memory
            pipeline._diffusion_model = pipeline.DiffusionModel(
                *size, MAX_PROMPT_LENGTH, download_weights=False, config=pipeline.config.unet
            )
            model = make_method(args, pipeline).model
    memory = count_memory(model, lambda: make_optimizer(args))
    trained, total = memory["trained"], memory["all"]
    print(f"parameters: {trained:,} of {total:,} are trained ({100 * trained / total:.2f} %)")
    for key in ("parameters", "gradients", "optimizer"):
        print(f"memory: {memory[key] / GIB:8.3f} GiB {key}")
    print("memory: activations come on top; --remat makes them less")
    passes = args.steps * args.batch / max(1, usable)
    print(f"steps: {args.steps} of {args.batch} pictures, {passes:.1f} times through all")


def prepare(args, process, say):
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
    examples = read_folder(args.pictures, args.prompt)
    bar = keras.utils.Progbar(len(examples), unit_name="picture", verbose=int(process == 0))
    examples, broken = cache.encode(examples, with_texts, lambda done, _: bar.update(done))
    for reason in broken:
        say(f"skipped: {reason}")
    say(f"{len(examples)} pictures, {len(broken)} skipped")
    streams = [Stream(examples)]
    if args.method == "dreambooth" and args.prior_weight:
        known, _ = cache.encode(read_folder(draw_class(args)))
        streams.append(Stream(known, args.prior_weight))
    if with_texts:
        cache.encode_texts([""])
    source._text_encoder = source._image_encoder = None  # no longer needed, unless a file is lost
    return cache, streams


def build(args):
    """Returns the `Method`, with its model compiled and its optimizer built."""
    import keras

    from stable_diffusion.training import distribution, remat_scope

    keras.config.set_dtype_policy(args.dtype)
    keras.utils.set_random_seed(args.seed)
    if args.distribute:
        distribution.distribute(args.distribute, args.model_devices)
    pipeline = open_pipeline(args)
    if args.remat:
        with remat_scope(pipeline.config.unet):
            pipeline.diffusion_model  # noqa: B018  is built when it is asked for
    method = make_method(args, pipeline)
    model = method.compile(make_optimizer(args), jit_compile=args.jit)
    model.optimizer.build(model.trainable_variables)
    return method


def make_callbacks(args, method, images, first, say, alone):
    """Returns what happens at each step beside training.

    Args:
        args: the arguments.
        method: the `Method`.
        images: pictures in a batch.
        first: steps that were taken before.
        say: prints a line.
        alone: whether there is no other process.

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
        show = summaries.image
    else:
        say("no TensorBoard: it isn't installed (pip install tensorboard)")
    if args.preview and not alone:
        say("no previews: they aren't drawn in several processes")
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


def save(args, method):
    """Writes the result."""
    keys = {"keys": args.keys} if args.parameters == "lora" else {}
    args.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    method.save(args.out, dtype=args.save_dtype, **keys)


def train(args, process, processes):
    """Trains, and writes the result; returns the exit status."""
    import keras

    from stable_diffusion.training import NoisyLatents, callbacks, load_state

    def say(message):
        if process == 0:
            print(message, flush=True)

    if process == 0:
        compare_settings(args)
    cache, streams = prepare(args, process, say)
    method = build(args)
    model, state = method.model, args.work / STATE
    first = load_state(state, model) if state.is_file() and not args.restart else 0
    if first > args.steps:
        raise ValueError(f"{args.work} has a run of {first} steps already, more than {args.steps}")
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
        # One of several processes can't stop by itself: the others would wait for it.
        with callbacks.stop_on_signals(saver) if processes == 1 else nullcontext():
            model.fit(data, shuffle=False, verbose=0, callbacks=[*used, saver] if saver else [])
    else:
        model.optimizer.finalize_variable_values(model.trainable_variables)
    if process:
        return 0
    keras.distribution.set_distribution(None)  # other processes don't build the remaining parts
    callbacks.draw_curve(args.work / "loss.png", callbacks.read_log(args.work / LOG))
    if saver.stop and saver.step < args.steps:
        say(f"stopped after step {saver.step} of {args.steps}: the same command goes on from there")
        return 130
    method.show()
    save(args, method)
    say(f"wrote {args.out}")
    return 0


def run(args):
    """Does what the arguments ask for; returns the exit status."""
    check(args)
    from stable_diffusion.training import distribution, read_folder

    process, processes = distribution.initialize()
    if processes > 1 and args.distribute != "data":
        raise ValueError("several processes need --distribute data")
    import keras

    args.jit = args.jit or keras.backend.backend() == "jax"
    examples = read_folder(args.pictures, args.prompt)
    check_captions(args, examples)
    if args.dry_run:
        keras.config.set_dtype_policy(args.dtype)
        dry_run(args, examples)
        return 0
    return train(args, process, processes)


def main(argv=None):
    """Runs the command line; returns the exit status."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return run(get_parser().parse_args(argv))
    except KeyboardInterrupt:
        message = "interrupted: the same command goes on from the last saved step"
        return complain(message, 130, NAME)
    except ValueError as error:
        return complain(error, 2, NAME)
    except (OSError, ImportError, MemoryError) as error:
        return complain(f"{type(error).__name__}: {error}", 1, NAME)


if __name__ == "__main__":
    sys.exit(main())

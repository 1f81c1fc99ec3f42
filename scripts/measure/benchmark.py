"""Times this package, KerasCV and diffusers in one run: each model, whole images, cold starts.

    pip install -e . keras-cv openvino torch diffusers transformers    # those that you have
    python scripts/measure/benchmark.py                                # the UNet at 512x512
    python scripts/measure/benchmark.py --what text_encoder unet decoder image --batch 1 2 4
    python scripts/measure/benchmark.py --what cold --files FOLDER --make      # 8 GB of files

A route is a library with a backend, a dtype and options; see `ROUTES`. Each measurement is a
process of its own. The routes take turns, --runs times, so that other work on the machine slows
all of them. A process builds a Stable Diffusion 1 in full size with random parameters. It runs once
("first"), then --repeat times ("warm").

The tables show medians over all processes. "GiB" is the peak memory of the whole process. "own"
leaves out the pages of files, such as OpenVINO's and safetensors', which the system takes back when
it needs them (Linux). "of peak" compares with a product of large matrices on this machine, in the
same run, in the best library and dtype that the route may use.

"image" generates an image with guidance and DDIM, in --steps steps. "cold" is the time from the
start of the process to the end of the first step. Its parameters come from files that --make
writes into --files: KerasCV's .h5 for KerasCV and this package, safetensors for diffusers and this
package.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# name: (library, KERAS_BACKEND, dtype, options)
ROUTES = {
    "keras_cv": ("keras_cv", "tensorflow", "float32", ""),
    "keras_cv bfloat16": ("keras_cv", "tensorflow", "bfloat16", ""),
    "keras_cv XLA": ("keras_cv", "tensorflow", "float32", "jit"),
    "keras_cv openvino": ("keras_cv", "openvino", "float32", ""),
    "diffusers": ("diffusers", "", "float32", ""),
    "diffusers bfloat16": ("diffusers", "", "bfloat16", ""),
    "diffusers bfloat16 NHWC": ("diffusers", "", "bfloat16", "channels_last"),
    "ours": ("ours", "tensorflow", "float32", ""),
    "ours bfloat16": ("ours", "tensorflow", "bfloat16", ""),
    "ours XLA": ("ours", "tensorflow", "float32", "jit"),
    "ours jax": ("ours", "jax", "float32", "jit"),
    "ours jax bfloat16": ("ours", "jax", "bfloat16", "jit"),
    "ours torch": ("ours", "torch", "float32", ""),
    "ours torch bfloat16": ("ours", "torch", "bfloat16", ""),
    "ours openvino": ("ours", "openvino", "float32", ""),
    "ours exported": ("ours", "openvino", "float32", "exported"),  # model.save(format="openvino")
}
DEFAULT = ["keras_cv", "keras_cv bfloat16", "diffusers", "diffusers bfloat16"]
DEFAULT += ["ours", "ours bfloat16", "ours openvino", "ours exported"]
BASE = "keras_cv"  # of the ratios, if it is among them; else the first
WHAT = ("text_encoder", "unet", "decoder", "image", "cold")
# Operations at 512x512 and batch 1, counted by torch.utils.flop_counter in diffusers' models.
OPERATIONS = {"text_encoder": 13.3e9, "unet": 803.3e9, "decoder": 2514.5e9}
PROMPT = "a photograph of an astronaut riding a horse"
MATRIX = 4096  # side of the matrices that are multiplied
TOKENS, WIDTH, END_OF_TEXT = 77, 768, 49407  # of the text encoder


def find_missing_package(route):
    """Returns the name of a package that a route needs and that is not installed, or None."""
    library, backend, _, _ = ROUTES[route]
    needs = {"ours": [backend], "keras_cv": ["keras_cv", backend]}
    needs["diffusers"] = ["torch", "diffusers", "transformers"]
    return next((name for name in needs[library] if not importlib.util.find_spec(name)), None)


def read_memory(kind, process="self"):
    """Returns what Linux says about the memory of a process, in bytes; 0 if the process has ended.

    "VmHWM" is the largest resident memory so far. "RssAnon" is the present one without the pages of
    files.
    """
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(kind)), 0)


# --- What a process of one route does: each prepares a function that runs once. ------------------


def make_keras_inputs(what, size, batch):
    """Returns random inputs for a model of this package or of KerasCV."""
    import numpy as np

    rng = np.random.default_rng(0)

    def draw_normal(*shape):
        return rng.standard_normal((batch, *shape), dtype="float32")

    if what == "text_encoder":
        tokens = rng.integers(0, END_OF_TEXT, (batch, TOKENS)).astype("int32")
        return [tokens, np.tile(np.arange(TOKENS, dtype="int32"), (batch, 1))]
    latent = draw_normal(size // 8, size // 8, 4)
    return latent if what == "decoder" else [latent, draw_normal(320), draw_normal(TOKENS, WIDTH)]


def randomize(model):
    """Fills a Keras model with small random numbers; with zeros it could be faster."""
    import numpy as np

    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(0.02 * rng.standard_normal(variable.shape, dtype="float32"))


def prepare_keras(library, what, size, batch, steps, option, files):
    """Returns the function that runs KerasCV or this package once."""
    jit = option == "jit"
    if library == "ours":
        from stable_diffusion import StableDiffusion
    else:
        from keras_cv.models import StableDiffusion
        from keras_cv.src.models.stable_diffusion import decoder, diffusion_model, text_encoder

    def build_component(component):
        if option == "exported":
            return getattr(StableDiffusion(size, size, jit, weights=files), component)
        if library == "ours":
            from stable_diffusion.checkpoints.building import uninitialized

            with uninitialized():
                model = getattr(StableDiffusion(size, size, jit, weights=None), component)
        elif component == "text_encoder":
            model = text_encoder.TextEncoder(TOKENS, download_weights=False)
        elif component == "decoder":
            model = decoder.Decoder(size, size, download_weights=False)
        else:
            model = diffusion_model.DiffusionModel(size, size, TOKENS, download_weights=False)
        if files:
            names = {"text_encoder": "kcv_encoder.h5", "decoder": "kcv_decoder.h5"}
            model.load_weights(Path(files, names.get(component, "kcv_diffusion_model.h5")))
        else:
            randomize(model)
        model.compile(jit_compile=jit)
        return model

    if what in ("text_encoder", "unet", "decoder"):
        model = build_component({"unet": "diffusion_model"}.get(what, what))
        inputs = make_keras_inputs(what, size, batch)
        return lambda: model.predict_on_batch(inputs)
    options = {"batch_size": batch, "num_steps": steps, "seed": 0}
    if library == "ours" and files:
        pipeline = StableDiffusion(size, size, jit, weights=files)
    else:
        pipeline = StableDiffusion(
            *(size, size, jit), **({"weights": None} if library == "ours" else {})
        )
        for component in ("text_encoder", "diffusion_model", "decoder"):
            setattr(pipeline, f"_{component}", build_component(component))
    if library == "keras_cv":
        from keras_cv.models.stable_diffusion import SimpleTokenizer

        from stable_diffusion.files import WEIGHTS_DIR

        vocabulary = WEIGHTS_DIR / "bpe_simple_vocab_16e6.txt.gz"
        pipeline._tokenizer = SimpleTokenizer(str(vocabulary))
    return lambda: pipeline.text_to_image(PROMPT, **options)


def prepare_diffusers(what, size, batch, steps, dtype, layout, files):
    """Returns the function that runs diffusers once."""
    import diffusers
    import torch
    import transformers

    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = {"dtype": getattr(torch, dtype), "device": device}
    last = layout == "channels_last"
    if last:
        kind["memory_format"] = torch.channels_last
    stages = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    torch.set_default_dtype(getattr(torch, dtype))  # otherwise models are built in float32 first

    def make_text_encoder():
        config = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        config |= {"num_attention_heads": 12, "vocab_size": 49408}
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))

    def make_unet():
        return diffusers.UNet2DConditionModel(sample_size=size // 8, cross_attention_dim=768)

    def make_vae():
        options = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
        return diffusers.AutoencoderKL(3, 3, *stages, **options)

    def draw_normal(*shape):
        return torch.randn(batch, *shape, device=device, dtype=kind["dtype"])

    def run_synchronised(function):
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    if what == "text_encoder":
        model = make_text_encoder().to(dtype=kind["dtype"], device=device)
        tokens = torch.randint(0, END_OF_TEXT, (batch, TOKENS), device=device)
        call = functools.partial(model, tokens)
    elif what == "unet":
        model, latent = make_unet().to(**kind), draw_normal(4, size // 8, size // 8)
        context, timestep = draw_normal(TOKENS, WIDTH), torch.tensor([981] * batch, device=device)
        latent = latent.contiguous(memory_format=kind.get("memory_format", torch.preserve_format))
        call = functools.partial(model, latent, timestep, context)
    elif what == "decoder":
        model, latent = make_vae().to(**kind), draw_normal(4, size // 8, size // 8)
        call = functools.partial(model.decode, latent)
    else:
        schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        schedule |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
        if files:
            pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
                files, torch_dtype=kind["dtype"]
            ).to(device)
        else:
            pipeline = diffusers.StableDiffusionPipeline(
                vae=make_vae(),
                text_encoder=make_text_encoder(),
                tokenizer=None,
                unet=make_unet(),
                scheduler=diffusers.DDIMScheduler(**schedule),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            ).to(device)
        if last:
            pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.set_progress_bar_config(disable=True)
        tokens = torch.full((1, TOKENS), END_OF_TEXT, device=device)

        def call():
            context = pipeline.text_encoder(tokens)[0]  # for the prompt and for the negative prompt
            embeds = {"prompt_embeds": context, "negative_prompt_embeds": context}
            options = {"num_inference_steps": steps, "num_images_per_prompt": batch}
            sizes = {"height": size, "width": size}
            return pipeline(**embeds, **options, **sizes, output_type="np").images

    return functools.partial(run_synchronised, call)


def measure_one_route(args):
    """Measures one route in this process and prints the result as JSON."""
    library, _, dtype, options = ROUTES[args.one]
    (what,), (batch,) = args.what, args.batch
    start = time.perf_counter()
    if library == "diffusers":
        files = args.files and Path(args.files) / "diffusers"
        run = prepare_diffusers(what, args.size, batch, args.steps, dtype, options, files)
    else:
        import keras

        keras.config.set_dtype_policy(dtype)
        files = args.files and Path(args.files) / args.format
        run = prepare_keras(library, what, args.size, batch, args.steps, options, files)
    built, times, busy = time.perf_counter() - start, [], []
    for _ in range(1 + args.repeat):
        start, used = time.perf_counter(), time.process_time()
        run()
        times.append(time.perf_counter() - start)
        busy.append(time.process_time() - used)
    result = {"built": built, "first": times[0], "warm": times[1:], "busy": busy[1:]}
    print(json.dumps(result | {"memory": read_memory("VmHWM")}))


def measure_product(args):
    """Measures in this process how many operations a second a product of matrices reaches."""
    library, dtype = args.multiply
    if library == "torch":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        a, b = torch.randn(2, MATRIX, MATRIX, device=device).to(getattr(torch, dtype))

        def multiply():
            return float((a @ b)[0, 0])
    else:
        import tensorflow as tf

        a, b = tf.cast(tf.random.normal((2, MATRIX, MATRIX)), dtype)

        def multiply():
            return float((a @ b)[0, 0])

    times = []
    for _ in range(4 + args.repeat):
        start = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - start)
    print(json.dumps({"speed": 2 * MATRIX**3 / min(times)}))


# --- The run. ------------------------------------------------------------------------------------


def run_process(backend, *arguments):
    """Runs this script in a process of its own.

    Returns:
        What it printed as JSON, with its whole time and memory; None if it failed.
    """
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    if backend:
        environment["KERAS_BACKEND"] = backend
    command = [sys.executable, __file__, *map(str, arguments)]
    pipes, own, output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}, 0, None
    start = time.perf_counter()
    with subprocess.Popen(command, text=True, env=environment, **pipes) as child:
        while output is None:
            try:
                output, errors = child.communicate(timeout=0.1)
            except subprocess.TimeoutExpired:
                own = max(own, read_memory("RssAnon", child.pid))
    seconds = time.perf_counter() - start
    if child.returncode:
        lines = errors.strip().splitlines() or [f"status {child.returncode}"]
        print(f"{' '.join(map(str, arguments))} failed: {lines[-1][:300]}", file=sys.stderr)
        return None
    return {"process": seconds, "own": own, **json.loads(output.splitlines()[-1])}


def measure_peaks(repeat):
    """Returns the operations a second of the best matrix product of each dtype."""
    peaks = {}
    for library in ("tensorflow", "torch"):
        if importlib.util.find_spec(library):
            for dtype in ("float32", "bfloat16"):
                result = run_process("", "--multiply", library, dtype, "--repeat", repeat)
                if result:
                    peaks[dtype] = max(peaks.get(dtype, 0), result["speed"])
    return peaks


def measure_routes(args, what, batch, routes):
    """Measures the routes in turns; returns for each a list with the result of each process."""
    cold = what == "cold"
    common = ["--size", args.size, "--batch", batch, "--repeat", 0 if cold else args.repeat]
    common += ["--what", "image" if cold else what, "--steps", 1 if cold else args.steps]
    variants = {}
    for route in routes:
        if ROUTES[route][3] == "exported":
            variants[route] = route, ["--files", args.exported, "--format", "openvino"]
        elif not cold:
            variants[route] = route, []
        elif ROUTES[route][0] == "ours":
            for name in ("kerascv", "diffusers"):
                files = ["--files", args.files, "--format", name]
                variants[f"{route}, {'.h5' if name == 'kerascv' else 'safetensors'}"] = route, files
        else:
            variants[route] = route, ["--files", args.files, "--format", "kerascv"]
    results = {name: [] for name in variants}
    for turn in range(args.runs):
        for name, (route, files) in variants.items():
            if sys.stderr.isatty():
                print(f"\r\033[K{what}, batch {batch}, {turn + 1}: {name}", end="", file=sys.stderr)
            backend = ROUTES[route][1]
            result = run_process(backend, "--one", route, *common, *files)
            results[name] += [result] if result else []
    return {name: found for name, found in results.items() if found}


def make_rows(args, what, batch, results, peaks):
    """Returns the rows of one table, from what `measure_routes` returned."""
    rows = []
    for name, found in results.items():
        warm = [seconds for result in found for seconds in result["warm"]]
        row = {"what": what, "batch": batch, "route": name}
        row["first"] = statistics.median(
            result["process" if what == "cold" else "first"] for result in found
        )
        row["built"] = statistics.median(result["built"] for result in found)
        row["memory"] = statistics.median(result["memory"] for result in found)
        row["own"] = statistics.median(result["own"] for result in found)
        row["warm"] = statistics.median(warm) if warm else row["first"]
        busy = [seconds for result in found for seconds in result["busy"]]
        row["busy"] = statistics.median(busy) if busy else float("nan")
        route = name.split(",")[0]
        dtype = "bfloat16" if ROUTES[route][1] == "openvino" else ROUTES[route][2]
        if what in OPERATIONS and args.size == 512 and peaks:
            speed = batch * OPERATIONS[what] / row["warm"]
            row["of_peak"] = speed / peaks.get(dtype, max(peaks.values()))
        row["per_minute"] = 60 * batch / row["warm"]
        rows.append(row)
    base = next((row for row in rows if row["route"] == BASE), rows[0] if rows else None)
    for row in rows:
        row["times_faster"] = base["warm"] / row["warm"]
        for kind in ("memory", "own"):
            row[f"{kind}_ratio"] = row[kind] / base[kind]
    return rows


def print_table(rows):
    """Prints the rows of one table."""
    first = rows[0]
    print(f"\n{first['what']}, batch {first['batch']}")
    print(
        f"{'':28}{'build s':>9}{'first s':>9}{'warm s':>9}{'CPU s':>8}{'faster':>8}"
        f"{'a minute':>10}{'of peak':>9}{'GiB':>7}{'of base':>9}{'own':>7}{'of base':>9}"
    )
    for row in rows:
        peak = f"{100 * row['of_peak']:8.0f}%" if "of_peak" in row else f"{'':9}"
        print(
            f"{row['route']:28}{row['built']:9.1f}{row['first']:9.2f}{row['warm']:9.2f}"
            f"{row['busy']:8.2f}{row['times_faster']:7.2f}x{row['per_minute']:10.2f}{peak}"
            f"{row['memory'] / 2**30:7.1f}{row['memory_ratio']:9.2f}"
            f"{row['own'] / 2**30:7.1f}{row['own_ratio']:9.2f}"
        )


def export_model(args):
    """Writes a Stable Diffusion 1 with random parameters for OpenVINO, in this process."""
    from stable_diffusion import StableDiffusion

    model = StableDiffusion(args.size, args.size, jit_compile=False, weights=None)
    model.save(Path(args.export) / "openvino", format="openvino")
    print("{}")


def make_files(folder):
    """Writes a Stable Diffusion 1 with random parameters in both formats."""
    from stable_diffusion import StableDiffusion

    model = StableDiffusion(jit_compile=False, weights=None)
    model.save(Path(folder) / "diffusers")
    model.save(Path(folder) / "kerascv", format="kerascv")


def get_parser():
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--what", nargs="+", choices=WHAT, default=["unet"], help="default: unet")
    add("--routes", nargs="+", choices=list(ROUTES), default=DEFAULT)
    add("--batch", nargs="+", type=int, default=[1], help="default: 1")
    add("--size", type=int, default=512, help="of the images in pixels (default: 512)")
    add("--steps", type=int, default=50, help="of an image (default: 50)")
    add("--runs", type=int, default=3, help="processes of each route (default: 3)")
    add("--repeat", type=int, default=3, help="warm runs in each process (default: 3)")
    add("--files", help="folder of parameters for cold starts")
    add("--make", action="store_true", help="write those files first")
    add("--json", action="store_true", help="print JSON in place of tables")
    add("--one", choices=list(ROUTES), help=argparse.SUPPRESS)
    add("--format", default="kerascv", help=argparse.SUPPRESS)
    add("--multiply", nargs=2, help=argparse.SUPPRESS)
    add("--export", help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.one:
        measure_one_route(args)
    elif args.multiply:
        measure_product(args)
    elif args.export:
        export_model(args)
    if args.one or args.multiply or args.export:
        return 0
    if "cold" in args.what and not args.files:
        parser.error("--what cold needs --files FOLDER, and --make the first time")
    if args.make:
        make_files(args.files)
    lacking = {route: find_missing_package(route) for route in args.routes}
    for route, package in lacking.items():
        if package:
            print(f"{route}: {package} is not installed", file=sys.stderr)
    routes = [route for route in args.routes if not lacking[route]]
    peaks, tables = measure_peaks(args.repeat), []
    with tempfile.TemporaryDirectory() as folder:
        args.exported = folder
        if any(ROUTES[route][3] == "exported" for route in routes):
            run_process("openvino", "--export", folder, "--size", args.size)
        for what in args.what:
            for batch in args.batch:
                results = measure_routes(args, what, batch, routes)
                rows = make_rows(args, what, batch, results, peaks)
                tables += [rows] if rows else []
    if args.json:
        rows = [row for table in tables for row in table]
        print(json.dumps({"peaks": peaks, "rows": rows, "missing": lacking}, indent=2))
        return 0
    for dtype, speed in peaks.items():
        print(f"product of {MATRIX}x{MATRIX} matrices, {dtype}: {speed / 1e9:.0f} GFLOP/s")
    for rows in tables:
        print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

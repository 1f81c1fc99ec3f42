"""What training reads and writes: captions, and the files of runs."""

import contextlib
import csv
import io
import json
from functools import cache
from pathlib import Path

import keras
import numpy as np
from keras import ops
from PIL import Image
from samples import equal, expect, make_pipeline, make_tokenizer, parse_safetensors, read_variable

from stable_diffusion.command import finetune
from stable_diffusion.training import Cache, callbacks, load_state, read_folder, save_state


def _write_images(folder):
    for n in range(3):
        Image.new("RGB", (8, 8), (80 * n, 0, 0)).save(folder / f"{n}.png")


CAPTIONS = ["a cat, red", 'a "dog"', "ein Zebra ä"]


def write_jsonl(folder):
    _write_images(folder)
    rows = [{"file_name": f"{n}.png", "text": text} for n, text in enumerate(CAPTIONS)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def write_csv(folder):
    _write_images(folder)
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        writer.writerows([f"{n}.png", text] for n, text in enumerate(CAPTIONS))


def check_images(copy, sample):
    examples = read_folder(copy)
    (path,) = copy.glob("metadata.*")
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix == ".csv":
        header, *rows = (row for row in csv.reader(io.StringIO(text, newline="")) if row)
        rows = [dict(zip(header, row, strict=True)) for row in rows]
    else:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    expected = {}
    for row in rows:
        expected.setdefault(row["file_name"], []).append(" ".join(row["text"].split()))
    found = {
        str(example.path.relative_to(copy)): [" ".join(text.split()) for text in example.captions]
        for example in examples
    }
    expect(found == expected, f"captions {found}, not {expected}")


@cache
def make_trained():
    """Returns a compiled model, as a run has it."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="one")])
    model.compile(keras.optimizers.AdamW(0.1), loss="mse")
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(4)
    for variable in (*model.weights, *model.optimizer.variables):
        if variable.dtype == "float32":
            variable.assign(rng.normal(size=variable.shape).astype("float32"))
    return model


def write_state(folder):
    save_state(folder / "state.safetensors", make_trained(), 7)


def check_state(copy, sample):
    path, model = copy / "state.safetensors", make_trained()
    variables = [*model.trainable_variables, *model.optimizer.variables]
    before = [np.array(ops.convert_to_numpy(v.value)) for v in variables]
    try:
        step = load_state(path, model)
    except ValueError:
        now = [ops.convert_to_numpy(v.value) for v in variables]
        good = all(map(np.array_equal, now, before))
        expect(good, "a refused state changed the model")
        raise
    tensors, metadata = parse_safetensors(path)
    expect(metadata["step"].strip() == str(step), f"step {step}")
    try:
        intact, _ = parse_safetensors(sample / "state.safetensors")
        places = {tensor.tobytes(): name for name, tensor in intact.items() if tensor.size > 1}
        found = 0
        for variable, value in zip(variables, before, strict=True):
            if value.size > 1:
                name = places[value.astype("float32").tobytes()]
                expect(np.isfinite(tensors[name]).all(), f"{name} is not finite")
                expect(equal(read_variable(variable), tensors[name]), f"{name} is another tensor")
                found += 1
        expect(found, "nothing was compared")
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


@cache
def make_cache(folder):
    pipeline = make_pipeline()
    pipeline._tokenizer = make_tokenizer(str(Path(folder).parent))
    return Cache(folder, pipeline)


def write_cache(folder):
    made = make_cache(str(folder))
    made.encode_texts(["a cat"])


def check_cache(copy, sample):
    pipeline = make_pipeline()
    pipeline._tokenizer = make_tokenizer(str(sample.parent))
    (file,) = sample.rglob("*.npy")
    intact = np.load(file)
    context = Cache(copy, pipeline).read_context("a cat")
    if equal(context, intact):
        return
    (file,) = copy.rglob("*.npy")
    stored = np.load(file, allow_pickle=False)
    expect(equal(context, stored), "the context is not that in the file")
    expect(context.dtype == intact.dtype and context.shape == intact.shape, f"{context.shape}")
    expect(np.isfinite(context).all(), "the context is not finite")


SETTINGS = "images --method lora --out run.safetensors --rank 2".split()


def make_settings(folder):
    """Returns the arguments of a run whose files are in a folder."""
    arguments = finetune.get_parser().parse_args([*SETTINGS, "--work", str(folder)])
    finetune.check_arguments(arguments)
    return arguments


def write_settings(folder):
    finetune.compare_settings(make_settings(folder))
    (folder / finetune.STATE).touch()  # so that the run goes on


def check_settings(copy, sample):
    stored = (copy / "settings.json").read_bytes()
    finetune.compare_settings(make_settings(copy))
    stored, intact = json.loads(stored), json.loads((sample / "settings.json").read_bytes())
    for key, value in intact.items():
        expect(stored.get(key, value) == value, f"{key} is {stored.get(key)!r:.40}")
    now = json.loads((copy / "settings.json").read_bytes())
    expect(now == intact, "the settings were not written again")


def write_log(folder):
    lines = [f"{n},0.{n}25,0.001,{n}.5" for n in range(1, 9)]
    header = "step,loss,learning_rate,images_per_second"
    (folder / "loss.csv").write_text("\n".join([header, *lines, ""]))


def check_log(copy, sample):
    rows = callbacks.read_log(copy / "loss.csv")
    lines = (copy / "loss.csv").read_bytes().decode("utf-8", "replace").split("\n")
    expected = []
    for line in lines:
        with contextlib.suppress(ValueError, OverflowError):
            step, loss, rate, speed = map(float, line.split(","))
            if np.isfinite(loss):
                expected.append([int(step), loss, rate, speed])
    found = [list(row.values()) for row in rows]
    expect(np.array_equal(found, expected, equal_nan=True), f"{found}, not {expected}")

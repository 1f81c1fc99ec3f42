"""Makes what tests/test_checkpoints_lora.py compares with: LoRAs as other libraries run them.

    pip install torch diffusers transformers peft
    python tests/data/make_lora_golden.py

Random adapters are given by peft to the tiny Stable Diffusions in tests/data/diffusers_golden, and
saved to tests/data/lora_golden with the names of each kind of file. The outputs, of the models with
adapters beside the kernels and merged into them, go to tests/data/lora_golden.npz, with those of a
text encoder that has a textual inversion. All is float32 on a CPU; what files hold is float16.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from transformers import CLIPTextModel

DATA = Path(__file__).parent
GUIDANCE, STEPS, TOKEN, VECTORS = 7.5, 4, "<cat>", 3
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out"]
PROJECTIONS = ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
TIME = ["linear_1", "linear_2"]
EVERYTHING = ATTENTION + CONVOLUTIONS + PROJECTIONS + TIME
SOME = ["to_k", *CONVOLUTIONS, "proj_in", "ff.net.2", "time_emb_proj", "linear_1"]
UNET_PATTERNS = {
    "rank_pattern": {"to_q": 3},
    "alpha_pattern": {r"conv\d": 5, "mid_block.attentions.0.proj_in": 7, ".*attn2.to_k": 1},
}
TEXT_PATTERNS = {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {".*mlp.fc1": 3}}
RSLORA = {"r": 3, "lora_alpha": 2, "use_rslora": True, "alpha_pattern": {"to_k|fc1": 3}}
RUNS = {  # family, and configs of the adapters of the diffusion model and of the text encoder
    "everything": (
        "v1",
        {"r": 2, "lora_alpha": 3, "target_modules": EVERYTHING, **UNET_PATTERNS},
        {"r": 2, "lora_alpha": 1, "target_modules": TEXT, **TEXT_PATTERNS},
    ),
    "attention": (
        "v1",
        {"r": 2, "lora_alpha": 2, "target_modules": ATTENTION},
        {"r": 2, "lora_alpha": 2, "target_modules": TEXT[:4]},
    ),
    "rslora": (
        "v1",
        {"target_modules": ATTENTION, **RSLORA},
        {"target_modules": TEXT, **RSLORA},
    ),
    "original": ("v1", {"r": 1, "lora_alpha": 2, "target_modules": SOME}, None),
    "linear": ("v2", {"r": 1, "lora_alpha": 2, "target_modules": SOME}, None),
}
# The original names of the tiny UNet's blocks, two levels of one block each, and in them.
ORIGINAL = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "conv_out": "out.2",
}
RESIDUAL = {
    ".conv1": ".in_layers.2",
    ".time_emb_proj": ".emb_layers.1",
    ".conv2": ".out_layers.3",
    ".conv_shortcut": ".skip_connection",
}
OLD = {  # the oldest names in the UNet
    f".{attn}.{name}.lora_{ab}": f".{attn}.processor.{name.removesuffix('.0')}_lora.{half}"
    for attn in ("attn1", "attn2")
    for name in ATTENTION
    for ab, half in (("A", "down"), ("B", "up"))
}


def layers(model):
    """Returns the layers of a model that have an adapter, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def adapt(model, config, generator):
    """Gives a model a random adapter, of numbers that float16 holds."""
    config = LoraConfig(init_lora_weights=False, **config)
    inject_adapter_in_model(config, model)
    model.peft_config = {"default": config}
    for layer in layers(model).values():
        for half in (layer.lora_A["default"], layer.lora_B["default"]):
            noise = torch.randn(half.weight.shape, generator=generator)
            half.weight.data = (0.7 * noise * half.weight[0].numel() ** -0.5).half().float()


def rename(state, table):
    """Replaces texts in names."""
    out = {}
    for name, tensor in state.items():
        for old, new in table.items():
            name = name.replace(old, new)
        out[name] = tensor
    return out


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def write(path, state, metadata=None):
    """Writes tensors as float16; alphas as they are."""
    state = {n: t.half().contiguous() if t.ndim else t.float() for n, t in state.items()}
    save_file(state, path, {"format": "pt", **(metadata or {})})


def alphas(prefix, model):
    """Returns kohya's alphas."""
    return {
        f"{prefix}{name.replace('.', '_')}.alpha": torch.tensor(float(layer.lora_alpha["default"]))
        for name, layer in layers(model).items()
    }


def kohya(unet_state, text_state, unet, text):
    """Returns the adapters of a UNet and a text encoder with kohya's names."""
    state = convert_state_dict_to_kohya(prefixed("unet.", unet_state) | text_state)
    state = rename(state, {"lora_te1_": "lora_te_"})  # those of Stable Diffusion 1 and 2
    true = alphas("lora_unet_", unet) | alphas("lora_te_text_model_", text)
    assert true.keys() == {name for name in state if name.endswith(".alpha")}
    return state | true


def undo_departures(unet):
    """Returns the adapter of a UNet with kohya's suffixes, and blocks named as by CompVis."""
    state = rename(get_peft_model_state_dict(unet), {"lora_A": "lora_down", "lora_B": "lora_up"})
    state |= {
        f"{n}.alpha": torch.tensor(float(m.lora_alpha["default"])) for n, m in layers(unet).items()
    }
    out = {}
    for name, tensor in state.items():
        block = next(b for b in ORIGINAL if name.startswith(f"{b}."))
        name = name.replace(block, ORIGINAL[block])
        if "resnets" in block:
            (name,) = rename({name: 0}, RESIDUAL)
        module, *suffix = name.rsplit(".", 1 if name.endswith(".alpha") else 2)
        out[".".join(["lora_unet_" + module.replace(".", "_"), *suffix])] = tensor
    return out


def metadata(unet, text):
    """Returns what diffusers writes of the adapters' configs."""
    packed = {}
    for prefix, model in (("unet", unet), ("text_encoder", text)):
        config = model.peft_config["default"].to_dict()
        config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        packed |= {f"{prefix}.{k}": v for k, v in config.items()}
    return {"lora_adapter_metadata": json.dumps(packed, sort_keys=True, default=str)}


def draw(folder, unet, context, noise):
    """Returns a picture of four steps with guidance."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(STEPS)
    for timestep in scheduler.timesteps:
        unguided, guided = unet(noise.repeat(2, 1, 1, 1), timestep, context).sample.chunk(2)
        predicted = unguided + GUIDANCE * (guided - unguided)
        noise = scheduler.step(predicted, timestep, noise).prev_sample
    decoded = vae.decode(noise / vae.config.scaling_factor).sample
    return ((decoded / 2 + 0.5).clip(0, 1) * 255).round().to(torch.uint8)


def save_all(name, out, folder, unet, text):
    """Writes the adapters of one of `RUNS` with the names of each kind of file."""
    states = [get_peft_model_state_dict(model) if layers(model) else {} for model in (unet, text)]
    unet_state, text_state = states[0], prefixed("text_encoder.text_model.", states[1])
    if name in ("everything", "linear"):
        write(out / f"{name}_kohya.safetensors", kohya(unet_state, text_state, unet, text))
    if name == "everything":
        # The newest transformers leave "text_model." out.
        both = prefixed("unet.", unet_state) | prefixed("text_encoder.", states[1])
        write(out / "everything_diffusers.safetensors", both, metadata(unet, text))
    if name == "original":
        write(out / "original_kohya.safetensors", undo_departures(unet))
    if name == "attention":
        older = convert_state_dict_to_diffusers(text_state)
        both = prefixed("unet.", convert_state_dict_to_diffusers(unet_state)) | older
        (out / "attention_folder").mkdir()
        write(out / "attention_folder" / "pytorch_lora_weights.safetensors", both)
        both = rename(unet_state, OLD) | rename(older, {"text_encoder.": ""})
        write(out / "attention_processor.safetensors", both)
    if name == "rslora":
        for part, model, state in (("unet", unet, states[0]), ("text_encoder", text, states[1])):
            fresh = type(model).from_pretrained(folder / part)
            fresh = get_peft_model(fresh, model.peft_config["default"])
            result = set_peft_model_state_dict(fresh, prefixed("base_model.model.", state))
            assert not result.unexpected_keys
            fresh.half().save_pretrained(out / f"rslora_peft_{part}")
            (out / f"rslora_peft_{part}" / "README.md").unlink(missing_ok=True)


def main():
    """Writes the files of each kind, and one npz."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA / "lora_golden")
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    torch.set_grad_enabled(False)
    results = {}
    for seed, (name, (family, unet_config, text_config)) in enumerate(RUNS.items()):
        folder, generator = DATA / "diffusers_golden" / family, torch.Generator().manual_seed(seed)
        with np.load(DATA / f"diffusers_golden_{family}.npz") as file:
            golden = {key: torch.from_numpy(array) for key, array in file.items()}
        latent, noise = (golden[key].movedim(-1, 1) for key in ("latent", "noise"))
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        adapt(unet.eval(), unet_config, generator)
        if text_config:
            adapt(text.eval(), text_config, generator)
        save_all(name, out, folder, unet, text)
        for suffix in ("", "_merged"):
            output = unet(latent, golden["timesteps"], golden["context"]).sample
            results[f"{name}_unet{suffix}"] = output
            context = text(golden["tokens"]).last_hidden_state
            if text_config:
                results[f"{name}_context{suffix}"] = context
            if name == "everything" and not suffix:
                results[f"{name}_drawn"] = draw(folder, unet, context, noise)
            if not suffix:
                for layer in (*layers(unet).values(), *layers(text).values()):
                    layer.merge()

    folder = DATA / "diffusers_golden" / "v1"
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    rows, width = text.config.vocab_size, text.config.hidden_size
    vectors = torch.randn(VECTORS, width, generator=generator).half().float()
    text.resize_token_embeddings(rows + VECTORS, mean_resizing=False)
    text.get_input_embeddings().weight[rows:] = vectors
    write(out / "embedding.safetensors", {TOKEN: vectors})
    end = text.config.eos_token_id
    ids = [text.config.bos_token_id, 5, *range(rows, rows + VECTORS), 17, end]
    tokens = torch.tensor([ids + [end] * (77 - len(ids))])
    results |= {"tokens": tokens, "embedding_context": text(tokens).last_hidden_state}
    # Channels last, as the models here have them.
    arrays = {n: (t.movedim(1, -1) if t.ndim == 4 else t).numpy() for n, t in results.items()}
    np.savez_compressed(out.with_suffix(".npz"), **arrays)
    for name, array in arrays.items():
        print(name, array.shape, f"{array.astype(float).std():.3f}")


if __name__ == "__main__":
    main()

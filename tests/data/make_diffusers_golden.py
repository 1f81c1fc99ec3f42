"""Makes what tests/test_diffusers_golden.py compares with: outputs of diffusers' own models.

    pip install torch diffusers transformers
    python tests/data/make_diffusers_golden.py

Two tiny Stable Diffusions with random parameters, one as version 1 and one as version 2, are run
by diffusers and transformers in float32 on a CPU. Their folders go to tests/data/diffusers_golden,
the outputs beside it. Parameters are numbers that float16 holds, so that files are small.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

FOLDER = Path(__file__).parent / "diffusers_golden"
START, END, LENGTH = 998, 999, 77  # the tiny vocabulary is 1000 tokens
PROMPT, NEGATIVE = [START, 5, 17, 300, END], [START, 42, END]
GUIDANCE, STEPS = 7.5, 4
FAMILIES = {
    "v1": {"act": "quick_gelu", "pad": END, "linear": False, "heads": [2, 4], "predict": "epsilon"},
    "v2": {"act": "gelu", "pad": 0, "linear": True, "heads": [1, 2], "predict": "v_prediction"},
}


def randomize(model, generator):
    """Gives every parameter, norms and biases too, a random value that float16 holds."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "embedding.weight" in name:
            value = 0.5 * noise
        elif p.ndim > 1:
            value = noise * p[0].numel() ** -0.5
        else:
            value = 0.2 * noise + ("norm" in name and name.endswith("weight"))
        p.data = value.half().float()
    return model.eval()


def save(model, path):
    """Writes a folder with float16 parameters, by diffusers or transformers."""
    model.half().save_pretrained(path, safe_serialization=True)
    model.float()


def main():
    """Writes one folder and one npz for each family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    folder = parser.parse_args().out
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_grad_enabled(False)
    for seed, (family, options) in enumerate(FAMILIES.items()):
        generator = torch.Generator().manual_seed(seed)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=END + 1,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                hidden_act=options["act"],
                bos_token_id=START,
                eos_token_id=END,
                pad_token_id=options["pad"],
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=options["heads"],
            use_linear_projection=options["linear"],
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=32,
        )
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=options["predict"],
        )
        parts = {"text_encoder": text, "unet": unet, "vae": vae}
        for name, model in parts.items():
            save(randomize(model, generator), folder / family / name)
        scheduler.save_pretrained(folder / family / "scheduler")
        pad = {"pad_token": "!" if options["pad"] == 0 else "<|endoftext|>"}
        path = folder / family / "tokenizer" / "special_tokens_map.json"
        path.parent.mkdir()
        path.write_text(json.dumps(pad) + "\n")

        def randn(*shape, generator=generator):
            return torch.randn(shape, generator=generator)

        out = {}
        ids = [ids + [options["pad"]] * (LENGTH - len(ids)) for ids in (NEGATIVE, PROMPT)]
        out["tokens"] = torch.tensor(ids)
        out["context"] = context = text(out["tokens"]).last_hidden_state
        out["latent"], out["timesteps"] = randn(2, 4, 8, 8), torch.tensor([1, 981])
        out["unet"] = unet(out["latent"], out["timesteps"], context).sample
        out["picture"] = randn(1, 3, 32, 48).clip(-1, 1)
        out["moments"] = vae.encode(out["picture"]).latent_dist.parameters
        out["decoded"] = vae.decode(out["latent"] / vae.config.scaling_factor).sample

        out["noise"] = latent = randn(1, 4, 8, 8)
        scheduler.set_timesteps(STEPS)
        out["steps"], trajectory = scheduler.timesteps, []
        for timestep in scheduler.timesteps:
            predicted = unet(latent.repeat(2, 1, 1, 1), timestep, context).sample
            unguided, guided = predicted.chunk(2)
            predicted = unguided + GUIDANCE * (guided - unguided)
            latent = scheduler.step(predicted, timestep, latent).prev_sample
            trajectory.append(latent)
        out["trajectory"] = torch.cat(trajectory)
        decoded = vae.decode(latent / vae.config.scaling_factor).sample
        out["drawn"] = ((decoded / 2 + 0.5).clip(0, 1) * 255).round().to(torch.uint8)
        # Channels last, as the models here have them.
        arrays = {k: v.movedim(1, -1) if v.ndim == 4 else v for k, v in out.items()}
        path = folder.with_name(f"{folder.name}_{family}.npz")
        np.savez_compressed(path, **{k: v.numpy() for k, v in arrays.items()})
        print(family, {k: (tuple(v.shape), float(v.float().std())) for k, v in arrays.items()})


if __name__ == "__main__":
    main()

"""Small pipelines of diffusers with random parameters, of each family of models."""

import diffusers
import torch
import transformers
from helpers import ROOT
from make_diffusers_golden import randomize

EMOJI = ROOT / "weights" / "emoji"

V1 = {
    "text": {"hidden_act": "quick_gelu", "num_attention_heads": 4},
    "unet": {"attention_head_dim": 8},
    "pad": "<|endoftext|>",
}
V2 = {
    "text": {"hidden_act": "gelu", "num_attention_heads": 2},
    "unet": {"attention_head_dim": [1, 2], "use_linear_projection": True},
    "pad": "!",
}
DOWN, UP = ["DownBlock2D", "UpBlock2D"], ["CrossAttnDownBlock2D", "CrossAttnUpBlock2D"]
FAMILIES = {
    "1": V1,
    "1 inpainting": V1 | {"unet": V1["unet"] | {"in_channels": 9}},
    "2 base": V2,
    "2 v-prediction": V2 | {"scheduler": {"prediction_type": "v_prediction"}},
    "turbo": V2
    | {
        "scheduler": {"timestep_spacing": "trailing", "steps_offset": 1},
        "scheduler_class": "EulerDiscreteScheduler",
    },
    "2 zero SNR": V2
    | {
        "scheduler": {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
    },
    # Distilled models, as BK-SDM and segmind's tiny-sd and small-sd: one layer a block, no middle.
    "tiny-sd": V1
    | {
        "unet": {
            "block_out_channels": (32, 64, 96),
            "down_block_types": (UP[0],) * 3,
            "up_block_types": (UP[1],) * 3,
            "mid_block_type": None,
            "attention_head_dim": 8,
        }
    },
    "small-sd": V1 | {"unet": V1["unet"] | {"mid_block_type": None}},
    "three levels": V1
    | {
        "unet": {
            "block_out_channels": (32, 64, 96),
            "down_block_types": (DOWN[0], UP[0], UP[0]),
            "up_block_types": (UP[1], UP[1], DOWN[1]),
            "layers_per_block": 2,
            "attention_head_dim": [2, 4, 6],
        },
        "scheduler": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    },
}


def make(family):
    """Returns a pipeline of diffusers, small, with random parameters."""
    generator = torch.Generator().manual_seed(0)
    options = FAMILIES[family]
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        EMOJI / "tokenizer", pad_token=options["pad"]
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    unet = {
        "sample_size": 8,
        "block_out_channels": (64, 128),
        "down_block_types": (UP[0], DOWN[0]),
        "up_block_types": (DOWN[1], UP[1]),
        "layers_per_block": 1,
        "cross_attention_dim": 64,
    }
    scheduler = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    kind = options.get("scheduler_class", "DDIMScheduler")
    if kind == "DDIMScheduler":
        scheduler |= {"clip_sample": False, "set_alpha_to_one": False}
    text_config = transformers.CLIPTextConfig(**text | options["text"])
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        sample_size=64,
    )
    return pipeline_of(
        text_encoder=randomize(transformers.CLIPTextModel(text_config), generator),
        unet=randomize(diffusers.UNet2DConditionModel(**unet | options["unet"]), generator),
        vae=randomize(vae, generator),
        tokenizer=tokenizer,
        scheduler=getattr(diffusers, kind)(**scheduler | options.get("scheduler", {})),
    )


def pipeline_of(**parts):
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )

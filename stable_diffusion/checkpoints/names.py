"""Names of parameters that several formats share: tables from our names of layers to theirs."""

from dataclasses import replace

from stable_diffusion.checkpoints.layout import Layout

TRANSFORMER = {  # in a spatial transformer; diffusers' and the original layout
    "norm1": "transformer_blocks.0.norm1",
    "attn1": "transformer_blocks.0.attn1",
    "norm2": "transformer_blocks.0.norm2",
    "attn2": "transformer_blocks.0.attn2",
    "norm3": "transformer_blocks.0.norm3",
    "geglu": "transformer_blocks.0.ff.net.0",
    "ff_out": "transformer_blocks.0.ff.net.2",
    "to_out": "to_out.0",
}
CLIP = Layout(  # transformers' text encoder, in diffusers' and the original layout
    names={
        "clip_embedding": "text_model.embeddings",
        "layer_{i}": "text_model.encoder.layers.{i}",
        "final_layer_norm": "text_model.final_layer_norm",
    },
    within={
        "to_q": "q_proj",
        "to_k": "k_proj",
        "to_v": "v_proj",
        "to_out": "out_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    },
    ignored=r"(text_model\.)?embeddings\.position_ids|logit_scale|text_projection\.weight",
    older=(("text_model.", ""),),  # the newest versions of transformers omit this prefix
)
MOST_LAYERS = 100  # of a text encoder


def ignore_layers(layout, depth):
    """Returns the layout of a text encoder of only `depth` layers, for files with more.

    Some configs leave the last layer out, as models need that were trained so.
    """
    numbers = "|".join(map(str, range(depth, MOST_LAYERS)))
    return replace(layout, ignored=rf"{layout.ignored}|.*(layers|resblocks)\.({numbers})\..*")


_VAE = {
    # The attention's projections are matrices in these files. They are 1x1 convolutions here, and
    # in older files.
    "within": {"norm": "group_norm", "attn": None, "to_out": "to_out.0"},
    "matrices": r"mid_attn/.*to_\w+/kernel$",
    "older": (
        (".to_q.", ".query."),
        (".to_k.", ".key."),
        (".to_v.", ".value."),
        (".to_out.0.", ".proj_attn."),
    ),
}
VAE_LAYOUTS = {  # in diffusers' layout
    "decoder": Layout(
        names={
            "post_quant_conv": "post_quant_conv",
            "conv_in": "decoder.conv_in",
            "mid_res_{i}": "decoder.mid_block.resnets.{i}",
            "mid_attn": "decoder.mid_block.attentions.0",
            "up_{i}_res_{j}": "decoder.up_blocks.{i}.resnets.{j}",
            "up_{i}_upsample": "decoder.up_blocks.{i}.upsamplers.0.conv",
            "conv_norm_out": "decoder.conv_norm_out",
            "conv_out": "decoder.conv_out",
        },
        ignored=r"(encoder|quant_conv)\..*",
        **_VAE,
    ),
    "image_encoder": Layout(
        names={
            "conv_in": "encoder.conv_in",
            "down_{i}_res_{j}": "encoder.down_blocks.{i}.resnets.{j}",
            "down_{i}_downsample": "encoder.down_blocks.{i}.downsamplers.0.conv",
            "mid_res_{i}": "encoder.mid_block.resnets.{i}",
            "mid_attn": "encoder.mid_block.attentions.0",
            "conv_norm_out": "encoder.conv_norm_out",
            "conv_out": "encoder.conv_out",
            "quant_conv": "quant_conv",
        },
        ignored=r"(decoder|post_quant_conv)\..*",
        **_VAE,
    ),
}


def name_tiny_vae(component, config, root="{}.layers.", first=0, ignored="") -> Layout:
    """Returns the layout of a half of a tiny VAE, whose layers are numbered from end to end.

    Args:
        component: "decoder" or "image_encoder".
        config: a `TinyVAEConfig`.
        root: text before each number, with {} for the half. The default is diffusers'.
        first: the number of the first convolution.
        ignored: pattern of other names that a file may have.
    """
    decodes = component == "decoder"
    half, way, repeats = ("decoder", "up", 1) if decodes else ("encoder", "down", 0)
    blocks = config.decoder_blocks if decodes else config.encoder_blocks
    root, n = root.format(half), first + 1 + decodes  # a ReLU follows the decoder's first one
    names = {"conv_in": f"{root}{first}"}
    for i, count in enumerate(blocks):
        names |= {f"{way}_{i}_res_{j}": f"{root}{n + j}" for j in range(count)}
        n += count
        if i < len(blocks) - 1:
            n += repeats  # which has no parameters
            names[f"{way}_{i}_{way}sample"] = f"{root}{n}"
            n += 1
    names["conv_out"] = f"{root}{n}"
    return Layout(
        names, residual={"conv1": "conv.0", "conv2": "conv.2", "conv3": "conv.4"}, ignored=ignored
    )

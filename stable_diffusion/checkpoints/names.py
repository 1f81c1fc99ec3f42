"""Names of parameters that several formats share: tables from our names of layers to theirs."""

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

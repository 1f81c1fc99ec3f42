"""DeepCache: the UNet's deep features change little between steps, and are used again."""

import keras
import numpy as np

from stable_diffusion.block import compile_like, cut_model
from stable_diffusion.checks import check_int
from stable_diffusion.diffusion_model import DiffusionModel


class DeepCache:
    """Runs the whole UNet in one step of `every`, and only its finest stage in the others.

    What the finest stage gets from below is that of the last whole run. A new object starts with
    one: make one for each batch of images. The whole UNet also runs where the size of the batch
    changes, as it does where guidance begins or ends. It may see two contexts of different lengths
    in a step: each has features of its own.

    Args:
        model: the `DiffusionModel`. Its parameters are shared, not copied.
        every: how many steps share the deep features; 1 is the model as it is, of any kind.

    Attributes:
        step: number of the sampler's step, which the pipeline sets. A sampler may run the model
            several times in one step.

    Raises:
        ValueError: another `every`, or a UNet of a single stage.

    Reference: Ma et al. 2023, https://arxiv.org/abs/2312.00858, equations 7 and 8. They cut above
    the last block; this cuts below the finest stage, which is slower and closer to the whole UNet.
    """

    def __init__(self, model, every):
        self.every, self.whole = check_int("deep_cache", every), model
        self.step, self.whole_step, self.deep = 0, None, {}
        if self.every > 1:
            self.whole, self.shallow = cut_model(model, _cut_finest_stage)

    def predict_on_batch(self, inputs):
        """Predicts as the model does, `inputs` a list of latent, embedding and context."""
        if self.every == 1:
            return self.whole.predict_on_batch(inputs)
        shape = np.shape(inputs[2])[:2]
        if shape not in self.deep or self.step - self.whole_step >= self.every:
            self.deep = self.deep if self.step == self.whole_step else {}
            self.whole_step = self.step
        if self.step == self.whole_step:
            # cache = U_deep(x) of this step (equation 7)
            output, self.deep[shape] = self.whole.predict_on_batch(inputs)
        else:
            # concat(D_shallow(x), cache of an earlier step) goes up (equation 8)
            output = self.shallow.predict_on_batch([*inputs, self.deep[shape]])
        return output


def _cut_finest_stage(model):
    """Returns the UNet with the deep features as second output, and its finest stage."""
    stages = len(model.config.widths) if isinstance(model, DiffusionModel) else 1
    if stages < 2:
        raise ValueError("deep_cache needs a DiffusionModel of several stages.")
    deep = model.get_layer(f"up_{stages - 2}_upsample").output
    whole = keras.Model(model.inputs, [*model.outputs, deep])
    shallow = keras.Model([*model.inputs, deep], model.outputs[0])
    for half in (whole, shallow):
        compile_like(half, model)
    return whole, shallow

"""DeepCache: the UNet's deep features change little between steps, and are used again."""

import keras

from stable_diffusion.block import cut_model
from stable_diffusion.diffusion_model import DiffusionModel


class DeepCache:
    """Runs the whole UNet in one step of `every`, and only its finest stage in the others.

    What the finest stage gets from below is that of the last whole run. A new object starts with
    one: make one for each batch of images. The whole UNet also runs where the size of the batch
    changes, as it does where guidance begins or ends.

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
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"deep_cache must be an int of at least 1, not {every!r}.")
        self.every, self.step, self.whole_step, self.deep, self.whole = every, 0, None, None, model
        if every > 1:
            self.whole, self.shallow = cut_model(model, _cut_finest_stage)

    def predict_on_batch(self, inputs):
        """Predicts as the model does, `inputs` a list of latent, embedding and context."""
        if self.every == 1:
            return self.whole.predict_on_batch(inputs)
        unusable = self.deep is None or len(self.deep) != len(inputs[0])
        if unusable or self.step - self.whole_step >= self.every:
            self.whole_step = self.step
        if self.step == self.whole_step:
            output, self.deep = self.whole.predict_on_batch(inputs)
        else:
            output = self.shallow.predict_on_batch([*inputs, self.deep])
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
        half.compile(jit_compile=model.jit_compile)
    return whole, shallow

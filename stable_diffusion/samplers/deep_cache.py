"""DeepCache: the UNet's deep features, which change little between steps, are used again."""

from weakref import WeakKeyDictionary

import keras

from stable_diffusion.diffusion_model import DiffusionModel

_split = WeakKeyDictionary()  # UNet to its two halves, so that they are compiled once


class DeepCache:
    """Runs the whole UNet at one call of `every`, and its finest level alone at the others.

    What the finest level gets from below is that of the last whole run. A new object starts with
    one: make one for each batch of pictures. Where the size of the batch changes (as guidance ends)
    the whole UNet runs, too.

    Args:
        model: the `DiffusionModel`. Its parameters are shared, not copied.
        every: how many calls share the deep features; 1 is the model as it is, of any kind.

    Raises:
        ValueError: another `every`, or a UNet of a single level.

    Reference: Ma et al. 2023, https://arxiv.org/abs/2312.00858, equations 7 and 8. They cut above
    the last block; this cuts below the finest level, which is slower and nearer to the whole.
    """

    def __init__(self, model, every):
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"deep_cache must be an int of at least 1, not {every!r}.")
        self.every, self.calls, self.deep, self.whole = every, 0, None, model
        if every > 1:
            if model not in _split:
                _split[model] = self._cut(model)
            self.whole, self.shallow = _split[model]

    @staticmethod
    def _cut(model):
        levels = len(model.config.widths) if isinstance(model, DiffusionModel) else 1
        if levels < 2:
            raise ValueError("deep_cache takes a DiffusionModel of several levels.")
        deep = model.get_layer(f"up_{levels - 2}_upsample").output
        whole = keras.Model(model.inputs, [*model.outputs, deep])
        shallow = keras.Model([*model.inputs, deep], model.outputs[0])
        for part in (whole, shallow):
            part.compile(jit_compile=model.jit_compile)
        return whole, shallow

    def predict_on_batch(self, inputs):
        """Predicts as the model does, `inputs` a list of latent, embedding and context."""
        if self.every == 1:
            return self.whole.predict_on_batch(inputs)
        due = self.calls % self.every == 0
        if due or len(self.deep) != len(inputs[0]):
            output, self.deep = self.whole.predict_on_batch(inputs)
            self.calls = 0
        else:
            output = self.shallow.predict_on_batch([*inputs, self.deep])
        self.calls += 1
        return output


def forget(model):
    """Drops the halves of a model, so that they are made and compiled anew."""
    _split.pop(model, None)

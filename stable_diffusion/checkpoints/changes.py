"""Remembers the parameters that a pipeline changed after they were loaded."""

from weakref import WeakKeyDictionary


class Changes:
    """The original values of parameters that adapters have changed.

    Each pipeline has one such object. It does not keep models alive.

    Attributes:
        words: list of what `adapters.embedding.remove_word` needs to remove each word of a LoRA.
    """

    def __init__(self):
        self.words = []
        self._originals = WeakKeyDictionary()  # model: {index in model.weights: array}

    def __contains__(self, model):
        return model in self._originals

    def keep_original(self, model, index, original):
        """Remembers the value of a parameter, unless an earlier value is known already.

        Args:
            model: the Keras model.
            index: index of the parameter in `model.weights`.
            original: numpy array of the parameter's shape and dtype.
        """
        self._originals.setdefault(model, {}).setdefault(index, original)

    def copy_originals(self, old, new):
        """Lets `restore_originals` restore a model to which the parameters of another were copied.

        Args:
            old: the model that the parameters were copied from.
            new: the model that they were copied to, with the same order of parameters.
        """
        if old in self._originals:
            self._originals[new] = dict(self._originals[old])

    def restore_originals(self):
        """Assigns every original value again, bit for bit, and forgets it.

        Returns:
            Dict from each changed model to the number of parameters that were restored in it.
        """
        counts = {}
        for model, originals in self._originals.items():
            for index, original in originals.items():
                model.weights[index].assign(original)
            counts[model] = len(originals)
        self._originals.clear()
        return counts

"""What a pipeline changed in its models since they were loaded."""

from weakref import WeakKeyDictionary


class Changes:
    """The parameters that adapters have changed, as they were before.

    A pipeline has one. Models that nothing else refers to any more are forgotten.
    """

    def __init__(self):
        self._originals = WeakKeyDictionary()  # model to a dict from the index of a weight to array

    def __contains__(self, model):
        return model in self._originals

    def keep(self, model, index, original):
        """Remembers what a parameter was, unless an earlier original is known.

        Args:
            model: the Keras model.
            index: place of the parameter in `model.weights`.
            original: numpy array of the parameter's dtype.
        """
        self._originals.setdefault(model, {}).setdefault(index, original)

    def move(self, old, new):
        """Lets a model that got all parameters of another be restored like the other."""
        if old in self._originals:
            self._originals[new] = dict(self._originals[old])

    def undo(self):
        """Restores every parameter exactly, and forgets the originals.

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

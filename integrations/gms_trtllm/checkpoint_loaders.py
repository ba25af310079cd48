"""Checkpoint loaders of TensorRT-LLM with GMS around them: of a writer, to see what was loaded; of a reader, to see that nothing is."""

from __future__ import annotations

from typing import Any

from gms_core.errors import LeaseConflict, UnpopulatedModule


class _Around:
    """Passes for the loader that it stands around, for whoever asks for its class too."""

    def __init__(self, original: Any) -> None:
        object.__setattr__(self, "_original", original)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._original, name, value)


class Watched(_Around):
    """A writer's checkpoint loader: a model is never published that it has given nothing for."""

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        object.__setattr__(self, "_loads", [])

    def load_weights(self, checkpoint_dir: Any, *args: Any, **options: Any) -> Any:
        """Load, of the target or of a draft.

        Raises:
            UnpopulatedModule: There are none, and none were put into the model either.
        """
        weights = self._original.load_weights(checkpoint_dir, *args, **options)
        preloaded = getattr(self._original, "is_weights_preloaded", None)
        if not weights and not (preloaded is not None and preloaded()):
            raise UnpopulatedModule(
                f"GMS RW: checkpoint loader '{type(self._original).__name__}' returned empty weights ({checkpoint_dir}) and did not preload the "
                "model. Refusing to commit an unpopulated model to the GMS pool.",
                hint="The checkpoint has no weights that this loader knows.",
            )
        self._loads.append(checkpoint_dir)
        return weights

    def check(self) -> None:
        """See whether it was asked at all.

        Raises:
            UnpopulatedModule: It was not.
        """
        if not self._loads:
            raise UnpopulatedModule(
                f"GMS RW: checkpoint loader '{type(self._original).__name__}' was not asked for weights. Refusing to commit an unpopulated model to "
                "the GMS pool.",
                hint="Something has changed the load format since GMS was asked for.",
            )


class Untouched(_Around):
    """A reader's checkpoint loader: it says what the model is, and never reads its weights."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise LeaseConflict("a reader has asked its checkpoint loader for weights, which are published already: this is a fault of the adapter")

    load_weights = _refuse
    open_weight_session = _refuse
    get_initialized_weight_mapper = _refuse

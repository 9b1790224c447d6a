"""What can be wrong with a checkpoint, each as one line a user can act on."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is one line and says what would serve."""


class ModelNotFound(CheckpointError):
    """Neither a named model, nor a folder, nor a repository that can be reached."""


class NoWeights(CheckpointError):
    """The folder holds no weights at all."""


class PickleCheckpoint(CheckpointError):
    """The only weights are in pickle files, which run code when they are opened."""


class UnsupportedCheckpoint(CheckpointError):
    """Weights or a configuration that this runner would compute wrongly."""


class DamagedCheckpoint(CheckpointError):
    """Files that are truncated, unreadable, or do not hold every parameter."""


class NoTokenizer(CheckpointError):
    """The checkpoint has no tokenizer that can be loaded."""


class NoChatTemplate(CheckpointError):
    """The tokenizer has no chat template, or one with no place for a video."""

"""Tasks: what models are trained and measured on.

`Batch` and `Task` are the interface; recall tasks are generators, text tasks read files. This
package knows nothing of layers, models or configuration.
"""

from tasks.base import Batch, Task
from tasks.recall import MQAR, ForgettingMQAR, Needle, RecallMixture
from tasks.text import (
    ByteTokenizer,
    LocalFiles,
    SentencePieceTokenizer,
    StandardLibrary,
    Text,
)

__all__ = [
    "MQAR",
    "Batch",
    "ByteTokenizer",
    "ForgettingMQAR",
    "LocalFiles",
    "Needle",
    "RecallMixture",
    "SentencePieceTokenizer",
    "StandardLibrary",
    "Task",
    "Text",
]

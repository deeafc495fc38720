from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class ModelIdentity(_message.Message):
    __slots__ = ("name", "commit", "architecture", "parameters", "weights", "dtype", "quantisation", "tokenizer", "chat_template", "layers", "heads")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTISATION_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    name: str
    commit: str
    architecture: str
    parameters: str
    weights: str
    dtype: str
    quantisation: str
    tokenizer: str
    chat_template: str
    layers: int
    heads: int
    def __init__(self, name: _Optional[str] = ..., commit: _Optional[str] = ..., architecture: _Optional[str] = ..., parameters: _Optional[str] = ..., weights: _Optional[str] = ..., dtype: _Optional[str] = ..., quantisation: _Optional[str] = ..., tokenizer: _Optional[str] = ..., chat_template: _Optional[str] = ..., layers: _Optional[int] = ..., heads: _Optional[int] = ...) -> None: ...

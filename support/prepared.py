from prepared import code_of as source_hash  # noqa: F401
from prepared import prepare  # noqa: F401

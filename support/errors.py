from config import UserError, printable  # noqa: F401
from training import fail, run_script, usage_error  # noqa: F401

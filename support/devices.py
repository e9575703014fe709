from training import computes_in_bf16, make_autocast, pick_device  # noqa: F401
from training import conv_layout as memory_format  # noqa: F401
from training import fetched_ahead as copied_back_ahead  # noqa: F401
from training import near as move_if_it_fits  # noqa: F401
from training import send as to_device  # noqa: F401
from training import take as gather_rows  # noqa: F401

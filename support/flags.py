from config import Parser, flags_to_hand_on, parse_training_args, positive_int  # noqa: F401
from training import add_sampling_flags, sampling_options  # noqa: F401

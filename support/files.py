from checkpoint import Damaged, free_megabytes, read_file, sync_folder, write_file  # noqa: F401

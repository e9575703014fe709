from training import Progress, append_csv, make_grid, plot_curves, png_bytes, read_csv, save_grid, show_progress, to_pil  # noqa: F401

from checkpoint import check_text_encoder, load_models, load_vae, newest_run  # noqa: F401

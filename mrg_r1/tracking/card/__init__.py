"""The model card of exported weights: README.md with the hub's metadata, made of what RUN's files say."""

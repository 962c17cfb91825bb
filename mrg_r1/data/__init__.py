"""Studies: manifests, converters, images, and the loader with its workers, the only places that call the processor."""
